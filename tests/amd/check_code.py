# Copyright 2026 The jax_attn Authors
# SPDX-License-Identifier: Apache-2.0
"""Checks the code of GPU kernels that was compiled for AMD targets.

    python tests/amd/check_code.py FILE...

Each file is an ELF of one target (`clang --cuda-device-only --no-gpu-bundle-output`). Every kernel
must keep its numbers in registers, fit the local memory of a block, read 16 bytes at a time, and
use matrix instructions if it is a matrix kernel. Prints a line for each, and exits with 1 if one
does not.
"""

import collections
import dataclasses
import re
import subprocess
import sys

LLVM = "-22"  # suffix of LLVM's tools
MAX_LOCAL_BYTES = 64 * 1024


@dataclasses.dataclass
class Kernel:
    target: str
    name: str
    notes: dict[str, int]  # what the compiler says that it needs
    instructions: collections.Counter

    def count(self, pattern):
        return sum(n for i, n in self.instructions.items() if re.match(pattern, i))

    def faults(self):
        """What is wrong with the kernel, in words."""
        for note, what in (
            ("private_segment_fixed_size", "bytes of scratch memory"),
            ("vgpr_spill_count", "vector registers spilled"),
            ("sgpr_spill_count", "scalar registers spilled"),
        ):
            if self.notes[note]:
                yield f"{self.notes[note]} {what}"
        if self.count("scratch_"):
            yield f"{self.count('scratch_')} instructions on scratch memory"
        if self.notes["group_segment_fixed_size"] > MAX_LOCAL_BYTES:
            yield f"{self.notes['group_segment_fixed_size']} bytes of local memory"
        if not self.count(r"(global|flat|buffer)_load_(dwordx4|b128)"):
            yield "no loads of 16 bytes"
        if "Matrix" in self.name and not self.count(self.matrix_instruction()):
            yield f"no {self.matrix_instruction()}"

    def matrix_instruction(self):
        """A pattern of the instruction that a matrix kernel is meant to use."""
        dtype = "f16" if re.search(r"Matrix\w+<(TileShape<)?float16", self.name) else "bf16"
        if self.target.startswith("gfx9"):
            return f"v_mfma_f32_16x16x16_?{dtype}"
        return f"v_wmma_f32_16x16x16_{dtype}"


def kernels(path):
    """The kernels of one ELF."""
    notes = tool("readelf", "--notes", path)
    target = re.search(r"amdhsa\.target:\s+\S*(gfx\w+)", notes)[1]
    code = instructions(path)
    entries = re.split(r"^  - (?=\.)", notes.split("amdhsa.kernels:")[1], flags=re.M)[1:]
    for entry in entries:
        fields = dict(re.findall(r"^ {0,4}\.(\w+): +(\S+)$", entry, flags=re.M))
        numbers = {name: int(x) for name, x in fields.items() if x.isdigit()}
        yield Kernel(target, readable(fields["name"]), numbers, code[fields["name"]])


def instructions(path):
    """How often each function has each instruction."""
    found = collections.defaultdict(collections.Counter)
    function = None
    for line in tool("objdump", "-d", "--no-show-raw-insn", path).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:", line):
            function = header[1]
        elif instruction := re.match(r"\s+([a-z]\w+)", line):
            found[function][instruction[1]] += 1
    return found


def readable(name):
    """A kernel's name with its types in words, such as `MatrixCore<bfloat16, int8, 128, 16>`."""
    plain = tool("cxxfilt", name).replace("jax_attn::gpu::", "")
    core = (
        re.search(r"\w+Core<.*?>(?=>)", plain)
        or re.search(r"(SmallSeq|FusedQkv)\w+<.*>(?=\()", plain)
        or re.search(r"\w+Kernel", plain)
    )
    types = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e4m3fnuz")
    types += ("float8_e5m2",)
    return re.sub(r"\(jax_attn::DType\)(\d+)", lambda m: types[int(m[1])], core[0])


def tool(name, *args):
    command = [f"llvm-{name}{LLVM}", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(paths):
    bad = 0
    for path in paths:
        for kernel in kernels(path):
            faults = list(kernel.faults())
            bad += bool(faults)
            print(
                f"{kernel.target:8} {kernel.name:60} {kernel.notes['vgpr_count']:3} vector and "
                f"{kernel.notes['sgpr_count']:3} scalar registers"
                + (f"; WRONG: {', '.join(faults)}" if faults else "")
            )
    if bad:
        sys.exit(f"{bad} kernels are not as they should be")


if __name__ == "__main__":
    main(sys.argv[1:])
