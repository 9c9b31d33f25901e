"""Products with quantised weights on CPUs, as machine code that LLVM makes when it is first asked for: no compiler is needed.

A weight's rows lie in *tiles*, as many as a vector has lanes, so that a vector holds one column of a tile, a lane for each row.
Columns go in *units* of 16. Of a unit of a tile there are

    nvfp4   2 vectors of 32-bit lanes, in a lane the codes of 8 columns, lowest bits first    a scale (E4M3) for each row
    fp8     16 vectors of bytes, one for each column                                          a scale (float32) for each row

Codes become float32 by one permutation of a table (E2M1), or by way of float16 (E4M3, and with it NVFP4's scales), whose exponent
has room for theirs: what is 2^8 too small by that is put right in the rows' scales. A unit is multiplied with up to 8 rows of
activations before the next is decoded; its sums are scaled once.

Rules for editors. 1: every sum and product is float32's, or float32 models lose their tokens. 2: no number goes through float32's
subnormals: they cost a hundred cycles each. 3: a tile's weights are read from memory once, whatever the rows.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import llvmlite.binding as llvm
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from orchestrator.core.config import WeightFormat
from workers.engines.nvfp4 import VALUES
from workers.engines.quantised import QuantisedMatrix
from workers.engines.threads import Kernel

#: Columns of a unit.
UNIT = 16
#: Bytes of codes that are asked for before they are needed: decoding keeps a core too busy to run ahead of itself.
AHEAD = 2048
_LINE = 64
#: What rows' scales are multiplied by: numbers that go through float16 with E4M3's exponents are too small by it, the biases
#: being 15 and 7.
ROW_SCALES = 2.0**8
#: What kernels read: pointers and numbers, 8 bytes each; first the counter of tiles that are taken, beginning with tile `first`.
_FIELDS = ("next", "rows", "codes", "scales", "row_scales", "result", "count", "tiles", "units", "shift", "first", "width")
_INTEGERS = ("count", "tiles", "units", "shift", "first", "width")
_RECORD = np.dtype([(name, np.int64) for name in _FIELDS])


@dataclass(frozen=True, slots=True)
class Machine:
    """What of a processor kernels are made for."""

    cpu: str
    features: str
    #: Of a vector of float32.
    lanes: int
    #: Rows of activations whose sums fit into the registers, largest first.
    blocks: tuple[int, ...]
    #: It has an instruction that rounds to bfloat16.
    rounds: bool


def machine_of(cpu: str, features: dict[str, bool]) -> Machine | None:
    """Return what kernels for a processor look like, None for one that they were not tried on."""
    text = ",".join(f"{'+' if on else '-'}{name}" for name, on in sorted(features.items()))
    if features.get("avx512f") and features.get("avx512bw") and features.get("avx512vl"):
        return Machine(cpu, text, 16, (8, 4, 2, 1), features.get("avx512bf16", False))
    if features.get("avx2") and features.get("fma") and features.get("f16c"):
        return Machine(cpu, text, 8, (4, 2, 1), False)
    return None


def this_machine() -> Machine | None:
    """Return what kernels for this processor look like, None if there are none."""
    if not llvm.get_process_triple().startswith("x86_64"):
        return None
    return machine_of(llvm.get_host_cpu_name(), dict(llvm.get_host_cpu_features()))


@dataclass(frozen=True, slots=True)
class Tiled:
    """A weight laid out for kernels; its rows and columns are filled up with zeros to whole tiles and units."""

    format: WeightFormat
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    #: 2^8 times what they are: see above.
    row_scales: Tensor
    tiles: int
    units: int
    #: Units go on by this many bits to the place of their scale.
    shift: int


def tile(weight: QuantisedMatrix, lanes: int) -> Tiled:
    """Lay a weight out for vectors of so many lanes."""
    rows, columns = weight.shape
    tiles, units = -(-rows // lanes), -(-columns // UNIT)
    nvfp4 = weight.format is WeightFormat.NVFP4
    codes = _filled(weight.codes, tiles * lanes, units * (UNIT // 2 if nvfp4 else UNIT))
    codes = codes.view(torch.int32) if nvfp4 else codes
    scales = _filled(weight.scales, tiles * lanes, weight.scales.shape[1])
    row_scales = _filled(weight.row_scales * ROW_SCALES, tiles * lanes, 1)
    shift = 0 if nvfp4 else max(0, (weight.block // UNIT).bit_length() - 1)
    parts = [part.view(tiles, lanes, -1).transpose(1, 2).contiguous() for part in (codes, scales)]
    return Tiled(weight.format, weight.shape, parts[0], parts[1], row_scales.contiguous(), tiles, units, shift)


def _filled(values: Tensor, rows: int, columns: int) -> Tensor:
    return functional.pad(values, (0, columns - values.shape[1], 0, rows - values.shape[0])).contiguous()


class Kernels:
    """The compiled kernels of one format: products, and decoding for products that others compute."""

    def __init__(self, weight_format: WeightFormat, machine: Machine) -> None:
        """Compile: a tenth of a second."""
        self.lanes = machine.lanes
        engine = _compiled(_source(weight_format, machine), machine)
        self._multiply = Kernel(engine.get_function_address("multiply"), engine)
        self._decode = {
            torch.float32: Kernel(engine.get_function_address("decode_float"), engine),
            torch.bfloat16: Kernel(engine.get_function_address("decode_bfloat"), engine),
        }

    def multiply(self, weight: Tiled, rows: Tensor) -> Tensor:
        """Return rows [n, columns] times the weight: float32 [n, weight's rows]."""
        rows = rows.to(torch.float32)
        short = weight.units * UNIT - rows.shape[1]
        rows = functional.pad(rows, (0, short)) if short else rows.contiguous()
        width = weight.tiles * self.lanes
        result = torch.empty(len(rows), width)
        self._run(self._multiply, weight, rows.data_ptr(), result, len(rows), range(weight.tiles))
        return result if width == weight.shape[0] else result[:, : weight.shape[0]]

    def decode(self, weight: Tiled, first: int, tiles: int, into: Tensor) -> None:
        """Write some tiles' weights into `into`, float32 or bfloat16: [columns, filled up to units; rows of these tiles].

        Without rows' scales: what is written is code x scale, which bfloat16 holds exactly (in FP8, where a row has one scale).
        """
        self._run(self._decode[into.dtype], weight, 0, into, 0, range(first, first + tiles))

    def _run(self, kernel: Kernel, weight: Tiled, rows: int, result: Tensor, count: int, tiles: range) -> None:
        pointers = [part.data_ptr() for part in (weight.codes, weight.scales, weight.row_scales, result)]
        numbers = (count, len(tiles), weight.units, weight.shift, tiles.start, result.shape[1])
        kernel.run(np.array([(0, rows, *pointers, *numbers)], dtype=_RECORD), min(torch.get_num_threads(), len(tiles)))


@functools.cache
def kernels_for(weight_format: WeightFormat) -> Kernels | None:
    """Return this process's kernels of a format, compiled when first asked for; None if this processor has none."""
    machine = this_machine()
    return None if machine is None else Kernels(weight_format, machine)


def _compiled(source: str, machine: Machine) -> llvm.ExecutionEngine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple().create_target_machine(cpu=machine.cpu, features=machine.features, opt=3)
    module = llvm.parse_assembly(source)
    module.verify()
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=2))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, target)
    engine.finalize_object()
    return engine


class _Writer:
    """Writes LLVM's assembly, a line an instruction, with a name for each result."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._names = 0

    def add(self, line: str) -> None:
        self.lines.append(line)

    def value(self, instruction: str) -> str:
        """Add an instruction and return what its result is called."""
        self._names += 1
        name = f"%v{self._names}"
        self.lines.append(f"{name} = {instruction}")
        return name

    def fields(self) -> None:
        """Read a kernel's record."""
        for place, field in enumerate(_FIELDS[1:], start=1):
            address = self.value(f"getelementptr i64, ptr %record, i64 {place}")
            self.add(f"%{field} = load {'i64' if field in _INTEGERS else 'ptr'}, ptr {address}")

    def at(self, base: str, kind: str, index: str) -> str:
        return self.value(f"getelementptr {kind}, ptr {base}, i64 {index}")


class _Decoder:
    """Writes what makes float32 out of a unit's codes and scales."""

    def __init__(self, writer: _Writer, weight_format: WeightFormat, lanes: int) -> None:
        self._writer = writer
        self._nvfp4 = weight_format is WeightFormat.NVFP4
        self._lanes = lanes
        self.floats = f"<{lanes} x float>"
        #: Bytes of a unit of a tile, and items of its scales.
        self.unit_bytes = lanes * (UNIT // 2 if self._nvfp4 else UNIT)
        self.scale_bytes = lanes * (1 if self._nvfp4 else 4)

    def codes(self, unit: str) -> list[str]:
        """Return the values of a unit's 16 columns, the unit's bytes beginning at a pointer."""
        return self._e2m1(unit) if self._nvfp4 else self._e4m3(unit)

    def scale(self, place: str) -> str:
        """Return a unit's scales."""
        if not self._nvfp4:
            return self._writer.value(f"load {self.floats}, ptr {place}, align 4")
        return self._halves(place, signed=False)

    def _e2m1(self, unit: str) -> list[str]:
        ints, write = f"<{self._lanes} x i32>", self._writer
        vectors = [write.value(f"load {ints}, ptr {write.at(unit, ints, str(half))}, align 4") for half in range(2)]
        found: list[str] = []
        for column in range(UNIT):
            vector, place = vectors[column // 8], column % 8
            shifted = vector if place == 0 else write.value(f"lshr {ints} {vector}, splat (i32 {4 * place})")
            found.append(self._looked_up(ints, shifted))
        return found

    def _looked_up(self, ints: str, index: str) -> str:
        """Return E2M1's values by the lowest four bits of each lane: a permutation looks at no others."""
        write = self._writer
        if self._lanes == len(VALUES):
            table = f"{self.floats} <{', '.join(f'float {one:e}' for one in VALUES)}>"
            return write.value(f"call {self.floats} @llvm.x86.avx512.permvar.sf.512({table}, {ints} {index})")
        table = f"{self.floats} <{', '.join(f'float {one:e}' for one in VALUES[: self._lanes])}>"
        size = write.value(f"call {self.floats} @llvm.x86.avx2.permps({table}, {ints} {index})")
        sign = write.value(f"and {ints} {write.value(f'shl {ints} {index}, splat (i32 28)')}, splat (i32 -2147483648)")
        signed = write.value(f"or {ints} {write.value(f'bitcast {self.floats} {size} to {ints}')}, {sign}")
        return write.value(f"bitcast {ints} {signed} to {self.floats}")

    def _e4m3(self, unit: str) -> list[str]:
        return [self._halves(self._writer.at(unit, "i8", str(column * self._lanes)), signed=True) for column in range(UNIT)]

    def _halves(self, place: str, signed: bool) -> str:
        """Return E4M3 codes as float16 with the same bits in exponent and mantissa, in float32: 2^8 too small."""
        write, bytes_, shorts = self._writer, f"<{self._lanes} x i8>", f"<{self._lanes} x i16>"
        loaded = write.value(f"load {bytes_}, ptr {place}, align 1")
        wide = write.value(f"{'sext' if signed else 'zext'} {bytes_} {loaded} to {shorts}")
        bits = write.value(f"shl {shorts} {wide}, splat (i16 7)")
        if signed:  # the sign came along twice: in its place, and in the exponent's highest bit
            bits = write.value(f"and {shorts} {bits}, splat (i16 {0xBFFF - 0x10000})")
        half = write.value(f"bitcast {shorts} {bits} to <{self._lanes} x half>")
        return write.value(f"fpext <{self._lanes} x half> {half} to {self.floats}")


def _source(weight_format: WeightFormat, machine: Machine) -> str:
    lanes = machine.lanes
    functions = [_block(weight_format, lanes, rows) for rows in machine.blocks]
    functions.append(_multiply(weight_format, lanes, machine.blocks))
    functions += [_decode(weight_format, machine, kind) for kind in ("float", "bfloat")]
    floats, ints = f"<{lanes} x float>", f"<{lanes} x i32>"
    look_up = "avx512.permvar.sf.512" if lanes == len(VALUES) else "avx2.permps"
    declared = (
        "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)\n"
        + f"declare {floats} @llvm.x86.{look_up}({floats}, {ints})\ndeclare {floats} @llvm.fma({floats}, {floats}, {floats})\n"
    )
    return declared.replace("@llvm.fma(", f"@llvm.fma.v{lanes}f32(") + "\n".join(functions)


def _block(weight_format: WeightFormat, lanes: int, rows: int) -> str:
    """Return the function that multiplies one tile with some rows."""
    write = _Writer()
    decoder = _Decoder(write, weight_format, lanes)
    floats = decoder.floats
    fma = f"call {floats} @llvm.fma.v{lanes}f32"
    write.add(
        f"define internal void @block{rows}(ptr %rows, ptr %codes, ptr %scales, ptr %row_scales, ptr %result, "
        "i64 %units, i64 %shift, i64 %width) alwaysinline {\nentry:\nbr label %loop\nloop:"
    )
    write.add("%unit = phi i64 [0, %entry], [%unit.next, %loop]")
    for row in range(rows):
        write.add(f"%sum{row} = phi {floats} [zeroinitializer, %entry], [%sum.next{row}, %loop]")
    columns = write.value(f"mul i64 %units, {UNIT}")
    column = write.value(f"mul i64 %unit, {UNIT}")
    place = write.at("%codes", "i8", write.value(f"mul i64 %unit, {decoder.unit_bytes}"))
    for line in range(0, decoder.unit_bytes, _LINE):
        write.add(f"call void @llvm.prefetch.p0(ptr {write.at(place, 'i8', str(AHEAD + line))}, i32 0, i32 3, i32 1)")
    values = decoder.codes(place)
    group = write.value("lshr i64 %unit, %shift")
    scale = decoder.scale(write.at("%scales", "i8", write.value(f"mul i64 {group}, {decoder.scale_bytes}")))
    for row in range(rows):
        start = write.value(f"add i64 {column}, {write.value(f'mul i64 {columns}, {row}')}")
        activations = write.at("%rows", "float", start)
        total = _unit_sum(write, values, activations, floats, lanes, chains=max(1, 4 // rows))
        write.add(f"%sum.next{row} = {fma}({floats} {total}, {floats} {scale}, {floats} %sum{row})")
    write.add("%unit.next = add i64 %unit, 1\n%more = icmp ult i64 %unit.next, %units")
    write.add("br i1 %more, label %loop, label %done\ndone:")
    row_scales = write.value(f"load {floats}, ptr %row_scales, align 4")
    for row in range(rows):
        scaled = write.value(f"fmul {floats} %sum.next{row}, {row_scales}")
        place = write.at("%result", "float", write.value(f"mul i64 %width, {row}"))
        write.add(f"store {floats} {scaled}, ptr {place}, align 4")
    write.add("ret void\n}")
    return "\n".join(write.lines)


def _unit_sum(write: _Writer, values: Sequence[str], activations: str, floats: str, lanes: int, chains: int) -> str:
    """Return the sum of a unit's columns times a row's activations, in a few sums that do not wait for each other."""
    sums: list[str] = []
    for column, value in enumerate(values):
        one = write.value(f"load float, ptr {write.at(activations, 'float', str(column))}, align 4")
        first = write.value(f"insertelement {floats} poison, float {one}, i32 0")
        all_lanes = write.value(f"shufflevector {floats} {first}, {floats} poison, <{lanes} x i32> zeroinitializer")
        if column < chains:
            sums.append(write.value(f"fmul {floats} {value}, {all_lanes}"))
        else:
            arguments = f"{floats} {value}, {floats} {all_lanes}, {floats} {sums[column % chains]}"
            sums[column % chains] = write.value(f"call {floats} @llvm.fma.v{lanes}f32({arguments})")
    while len(sums) > 1:
        sums = [write.value(f"fadd {floats} {one}, {other}") for one, other in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _begin(write: _Writer, name: str, decoder: _Decoder, lanes: int) -> None:
    """Write a kernel's beginning: it takes tiles from the counter until there are none, and then where the tile's parts are."""
    write.add(f"define void @{name}(ptr %record) {{\nentry:")
    write.fields()
    write.add("%last.unit = sub i64 %units, 1\n%last.group = lshr i64 %last.unit, %shift\n%groups = add i64 %last.group, 1")
    write.add("br label %take\ntake:\n%taken = atomicrmw add ptr %record, i64 1 acq_rel")
    write.add("%left = icmp ult i64 %taken, %tiles\n%tile = add i64 %taken, %first\nbr i1 %left, label %work, label %end\nwork:")
    write.add(f"%row.first = mul i64 %tile, {lanes}")
    write.add(f"%unit.bytes = mul i64 %units, {decoder.unit_bytes}\n%codes.bytes = mul i64 %tile, %unit.bytes")
    write.add(f"%group.bytes = mul i64 %groups, {decoder.scale_bytes}\n%scales.bytes = mul i64 %tile, %group.bytes")
    write.add("%tile.codes = getelementptr i8, ptr %codes, i64 %codes.bytes")
    write.add("%tile.scales = getelementptr i8, ptr %scales, i64 %scales.bytes")
    write.add("%tile.row_scales = getelementptr float, ptr %row_scales, i64 %row.first")


def _multiply(weight_format: WeightFormat, lanes: int, blocks: Sequence[int]) -> str:
    """Return the kernel of products: of each tile, all rows in blocks, the largest first."""
    write = _Writer()
    _begin(write, "multiply", _Decoder(write, weight_format, lanes), lanes)
    write.add("%tile.result = getelementptr float, ptr %result, i64 %row.first")
    write.add(f"%columns = mul i64 %units, {UNIT}\nbr label %try{blocks[0]}")
    for place, rows in enumerate(blocks):
        following = f"try{blocks[place + 1]}" if place + 1 < len(blocks) else "take"
        came = f"[0, %work], [%done{rows}, %do{rows}]"
        if place:
            came = f"[%at{blocks[place - 1]}, %try{blocks[place - 1]}], [%done{rows}, %do{rows}]"
        write.add(f"try{rows}:\n%at{rows} = phi i64 {came}\n%done{rows} = add i64 %at{rows}, {rows}")
        write.add(
            f"%fits{rows} = icmp ule i64 %done{rows}, %count\nbr i1 %fits{rows}, label %do{rows}, label %{following}\ndo{rows}:"
        )
        activations = write.at("%rows", "float", write.value(f"mul i64 %at{rows}, %columns"))
        result = write.at("%tile.result", "float", write.value(f"mul i64 %at{rows}, %width"))
        arguments = f"ptr {activations}, ptr %tile.codes, ptr %tile.scales, ptr %tile.row_scales, ptr {result}"
        write.add(f"call void @block{rows}({arguments}, i64 %units, i64 %shift, i64 %width)\nbr label %try{rows}")
    write.add("end:\nret void\n}")
    return "\n".join(write.lines)


def _decode(weight_format: WeightFormat, machine: Machine, kind: str) -> str:
    """Return the kernel that decodes tiles, turned: a row of the result is a column of the weight."""
    write, lanes = _Writer(), machine.lanes
    decoder = _Decoder(write, weight_format, lanes)
    floats = decoder.floats
    _begin(write, f"decode_{kind}", decoder, lanes)
    write.add(f"%first.row = mul i64 %first, {lanes}\n%place = sub i64 %row.first, %first.row")
    write.add(f"%tile.result = getelementptr {kind}, ptr %result, i64 %place")
    write.add("br label %loop\nloop:")
    write.add("%unit = phi i64 [0, %work], [%unit.next, %loop]")
    values = decoder.codes(write.at("%tile.codes", "i8", write.value(f"mul i64 %unit, {decoder.unit_bytes}")))
    group = write.value("lshr i64 %unit, %shift")
    scale = decoder.scale(write.at("%tile.scales", "i8", write.value(f"mul i64 {group}, {decoder.scale_bytes}")))
    scale = write.value(f"fmul {floats} {scale}, splat (float {ROW_SCALES:e})")
    column = write.value(f"mul i64 %unit, {UNIT}")
    for place, value in enumerate(values):
        scaled = write.value(f"fmul {floats} {value}, {scale}")
        if kind != "float":
            scaled = _rounded(write, scaled, machine)
        row = write.value(f"mul i64 {write.value(f'add i64 {column}, {place}')}, %width")
        write.add(f"store <{lanes} x {kind}> {scaled}, ptr {write.at('%tile.result', kind, row)}, align 2")
    write.add("%unit.next = add i64 %unit, 1\n%more = icmp ult i64 %unit.next, %units")
    write.add("br i1 %more, label %loop, label %take\nend:\nret void\n}")
    return "\n".join(write.lines)


def _rounded(write: _Writer, value: str, machine: Machine) -> str:
    """Return finite float32 as bfloat16: the nearest, ties to even."""
    floats, ints = f"<{machine.lanes} x float>", f"<{machine.lanes} x i32>"
    if machine.rounds:
        return write.value(f"fptrunc {floats} {value} to <{machine.lanes} x bfloat>")
    bits = write.value(f"bitcast {floats} {value} to {ints}")
    odd = write.value(f"and {ints} {write.value(f'lshr {ints} {bits}, splat (i32 16)')}, splat (i32 1)")
    near = write.value(f"add {ints} {write.value(f'add {ints} {bits}, splat (i32 32767)')}, {odd}")
    short = write.value(f"trunc {ints} {write.value(f'lshr {ints} {near}, splat (i32 16)')} to <{machine.lanes} x i16>")
    return write.value(f"bitcast <{machine.lanes} x i16> {short} to <{machine.lanes} x bfloat>")
