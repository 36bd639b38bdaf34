"""Build the libraries that torch_npu wants from CANN: python -m conformance.stand_ins.build OUT.

Run by the Python that has torch_npu; needs g++, nm and readelf. torch_npu binds every symbol when
it is loaded, so each one that its libraries want from CANN must exist:

- device.cpp defines what is really called (memory, streams, events);
- every other one is generated as a function that returns 0;
- libopapi.so, which torch_npu opens by name, records each aclnn call (recorder.cpp).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = ("g++", "nm", "readelf")
COMPILE = ("g++", "-std=c++17", "-fPIC", "-O1", "-w")
# Names that only CANN's libraries define: ACL, the runtime, profiling, collective communication, GE
# in C++ (_ZN2ge...), and the "secure" C functions that CANN ships.
FROM_CANN = re.compile(r"acl[a-zA-Z]|rt[A-Z]|Msprof|Hccl|_ZNK?2ge|v?snprintf_s$|strcpy_s$")
# A 0 from these would leave a buffer unwritten that the caller reads.
SECURE_C = """
#include <cstdarg>
#include <cstddef>
#include <cstdio>
extern "C" int vsnprintf_s(char *to, size_t size, size_t, const char *format, va_list arguments) {
  return vsnprintf(to, size, format, arguments);
}
extern "C" int snprintf_s(char *to, size_t size, size_t, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int written = vsnprintf(to, size, format, arguments);
  va_end(arguments);
  return written;
}
extern "C" int strcpy_s(char *to, size_t size, const char *from) {
  return snprintf(to, size, "%s", from) < 0;
}
"""
C_TYPES = {
    "tensor": "const void *",
    "int64": "int64_t ",
    "int32": "int32_t ",
    "bool": "bool ",
    "double": "double ",
    "text": "const char *",
}
METHODS = {"int64": "integer", "int32": "integer", "bool": "boolean", "double": "real"}


def build(out: Path) -> None:
    """Write the libraries into the folder `out`. Raises CalledProcessError, FileNotFoundError."""
    out.mkdir(parents=True, exist_ok=True)
    wheel = _package_folder("torch_npu")
    headers = wheel / "include" / "third_party" / "acl" / "inc"
    include = [f"-I{headers}", f"-I{headers / 'acl'}", f"-I{HERE}"]
    libraries = [
        *wheel.glob("_C*.so"),
        *(library for library in wheel.glob("lib/*.so") if "atb" not in library.name),
        *wheel.glob("dynamo/torchair/core/*.so"),
    ]

    device = _compile(HERE / "device.cpp", out, include)
    wanted = _symbols("--undefined-only", libraries) - _symbols("--defined-only", libraries)
    missing = {name for name in wanted if FROM_CANN.match(name)} - _symbols("", [device])
    empty = out / "empty_functions.cpp"
    empty.write_text(SECURE_C + "\n".join(_empty_functions(missing)), encoding="utf-8")
    objects = [device, _compile(empty, out, include)]
    _link(out / "libascendcl.so", objects)
    for name in sorted(_missing_libraries(libraries) - {"libascendcl.so"}):
        _link(out / name, [], f"-L{out}", "-Wl,--no-as-needed", "-lascendcl")

    entries = out / "aclnn_entries.cpp"
    host_code = (wheel / "lib" / "libtorch_npu.so").read_bytes()
    entries.write_text("\n".join(_aclnn_entries(host_code)), encoding="utf-8")
    recorder = _compile(HERE / "recorder.cpp", out, include)
    _link(out / "libopapi.so", [recorder, _compile(entries, out, include)], "-Wl,-Bsymbolic")


def _package_folder(name: str) -> Path:
    """Where a package is, without importing it: torch_npu cannot be imported yet."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _symbols(which: str, files: list[Path]) -> set[str]:
    """The dynamic symbols of libraries, or all symbols of one object file."""
    options = ["-D", which] if which else ["--defined-only"]
    lines = (_output("nm", *options, file).splitlines() for file in files)
    words = (line.split() for of_file in lines for line in of_file)
    return {parts[-1].split("@")[0] for parts in words if parts}


def _missing_libraries(libraries: list[Path]) -> set[str]:
    """Which libraries these link that neither torch_npu, torch nor the system has."""
    own = {library.name for library in libraries}
    torch_has = {path.name for path in (_package_folder("torch") / "lib").iterdir()}
    linked = {
        name
        for library in libraries
        for name in re.findall(r"NEEDED.*\[(.+)\]", _output("readelf", "-d", library))
    }
    return {name for name in linked - own - torch_has if name.endswith(".so")}


def _empty_functions(names: set[str]) -> Iterator[str]:
    """A function that returns 0 for each name, C++ names included."""
    secure = {"vsnprintf_s", "snprintf_s", "strcpy_s"}
    for index, name in enumerate(sorted(names - secure)):
        yield f'extern "C" long empty_{index}() __asm__("{name}");'
        yield f'extern "C" long empty_{index}() {{ return 0; }}'


def _aclnn_entries(host_code: bytes) -> Iterator[str]:
    """Both calls of every aclnn function that torch_npu's library names."""
    yield '#include "recorder.hpp"'
    known = dict(_prototypes())
    names = {name.decode() for name in re.findall(rb"aclnn[A-Z]\w+", host_code)}
    for name in sorted({name.removesuffix("GetWorkspaceSize") for name in names} | set(known)):
        yield f'extern "C" int {name}() {{ return 0; }}'
        if name in known:
            yield _typed_entry(name, known[name])
        else:
            body = f'return recorder::unknown("{name}");'
            yield f'extern "C" int {name}GetWorkspaceSize() {{ {body} }}'


def _prototypes() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Name and (type, argument name) of each line in prototypes.txt."""
    for line in (HERE / "prototypes.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, arguments = line.partition(": ")
            pairs = [argument.split() for argument in arguments.split(", ")]
            yield name, [(kind, word) for kind, word in pairs]


def _typed_entry(name: str, arguments: list[tuple[str, str]]) -> str:
    parameters = "".join(f"{C_TYPES[kind]}{word}, " for kind, word in arguments)
    notes = "".join(
        f'call.{METHODS.get(kind, kind)}("{word}", {word}); ' for kind, word in arguments
    )
    return (
        f'extern "C" int {name}GetWorkspaceSize('
        f"{parameters}uint64_t *size, aclOpExecutor **executor) "
        f'{{ recorder::Call call("{name}"); {notes}return call.end(size, executor); }}'
    )


def _compile(source: Path, out: Path, include: list[str]) -> Path:
    target = out / f"{source.stem}.o"
    subprocess.run([*COMPILE, *include, "-c", source, "-o", target], check=True)
    return target


def _link(target: Path, objects: list[Path], *options: str) -> None:
    command = ["g++", "-shared", "-o", target, *objects, f"-Wl,-soname,{target.name}", *options]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
