# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Makes of Triton's wheel a folder that Clang takes for ROCm, enough to compile and link kernels.

    python tests/amd/make_rocm.py triton-3.6.0-....whl build/rocm

The wheel has HIP's headers and AMD's device libraries ocml and ockl. What it lacks are libraries of
one constant each, from which Clang picks by target and options, and what CMake looks for.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

LLVM = "-22"  # suffix of LLVM's tools
TARGETS = ("906", "90a", "942", "950", "1100", "1201")  # gfx906: what CMake tries the compiler with
IN_WHEEL = "triton/backends/amd/"

HIP_LANG = """\
add_library(hip-lang::amdhip64 SHARED IMPORTED)
set_target_properties(hip-lang::amdhip64 PROPERTIES
  IMPORTED_LOCATION "{root}/lib/libamdhip64.so" IMPORTED_SONAME libamdhip64.so.7)
add_library(hip-lang::device INTERFACE IMPORTED)
set_target_properties(hip-lang::device PROPERTIES
  INTERFACE_LINK_LIBRARIES hip-lang::amdhip64
  INTERFACE_SYSTEM_INCLUDE_DIRECTORIES "$<$<COMPILE_LANGUAGE:HIP>:{root}/include>"
  INTERFACE_LINK_OPTIONS "$<$<LINK_LANGUAGE:HIP>:--hip-link>")
set(_CMAKE_HIP_DEVICE_RUNTIME_TARGET "hip-lang::device")
"""


def main(wheel, root):
    shutil.rmtree(root, ignore_errors=True)
    libraries = root / "amdgcn" / "bitcode"
    libraries.mkdir(parents=True)
    unpack(wheel, root, libraries)
    for name, constants in control_libraries():
        write_library(libraries, name, constants)
    write(root / "share" / "hip" / "version", "".join(f"{k}={v}\n" for k, v in version(root)))
    write(root / "lib" / "cmake" / "hip-lang" / "hip-lang-config.cmake", HIP_LANG.format(root=root))
    stand_in = str(pathlib.Path(__file__).with_name("stand_in.c"))
    soname = "libamdhip64.so.7"
    options = ("-shared", "-fPIC", "-O1", "-Wall", "-Wextra", f"-Wl,-soname,{soname}")
    run(f"clang{LLVM}", *options, stand_in, "-o", str(root / "lib" / soname))
    (root / "lib" / "libamdhip64.so").symlink_to(soname)
    (root / "complete").touch()


def unpack(wheel, root, libraries):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            inside = name.removeprefix(IN_WHEEL)
            if inside in ("lib/ocml.bc", "lib/ockl.bc"):
                (libraries / inside.removeprefix("lib/")).write_bytes(archive.read(name))
            elif inside.startswith(("include/hip/", "include/hsa/")) and not name.endswith("/"):
                write(root / inside, archive.read(name).decode())


def control_libraries():
    """Names of libraries, and their constants as (name, type, value)."""
    for name, constant in (
        ("unsafe_math", "unsafe_math_opt"),
        ("finite_only", "finite_only_opt"),
        ("daz_opt", "daz_opt"),
        ("correctly_rounded_sqrt", "correctly_rounded_sqrt32"),
    ):
        for value, state in enumerate(("off", "on")):
            yield f"oclc_{name}_{state}", [(constant, "i8", value)]
    for state, log2 in (("on", 6), ("off", 5)):
        yield (
            f"oclc_wavefrontsize64_{state}",
            [("wavefrontsize64", "i8", log2 - 5), ("wavefrontsize_log2", "i32", log2)],
        )
    for abi in (400, 500, 600):
        yield f"oclc_abi_version_{abi}", [("ABI_version", "i32", abi)]
    for target in TARGETS:  # gfx90a is 9, 0, 10: the last two digits are hexadecimal
        major, minor, step = int(target[:-2]), int(target[-2], 16), int(target[-1], 16)
        number = major * 1000 + minor * 100 + step
        yield f"oclc_isa_version_{target}", [("ISA_version", "i32", number)]
    # Clang asks that these exist.
    yield "opencl", []
    yield "hip", []


def write_library(libraries, name, constants):
    known = run(f"llvm-dis{LLVM}", "-o", "-", str(libraries / "ockl.bc"))
    lines = [line for line in known.splitlines()[:10] if line.startswith("target ")]
    for constant, dtype, value in constants:
        lines.append(
            f"@__oclc_{constant} = linkonce_odr hidden local_unnamed_addr addrspace(4) "
            f"constant {dtype} {value}"
        )
    text = "\n".join(lines) + "\n"
    run(f"llvm-as{LLVM}", "-o", str(libraries / f"{name}.bc"), "-", stdin=text)


def version(root):
    header = (root / "include" / "hip" / "hip_version.h").read_text()
    for part in ("MAJOR", "MINOR", "PATCH"):
        yield f"HIP_VERSION_{part}", re.search(rf"HIP_VERSION_{part} (\d+)", header)[1]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(*command, stdin=None):
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).absolute())
