"""Built-in recipes, one YAML file each."""

if __name__ != "panguq.recipes":
    raise ImportError(
        "this folder is the package panguq.recipes;"
        " install panguq (pip install -e .) and import that"
    )
