"""Built-in recipes, one YAML file each."""

if __name__ != "panguq.builtin_recipes":
    raise ImportError(
        "this folder is the package panguq.builtin_recipes;"
        " install panguq (pip install -e .) and import that"
    )
