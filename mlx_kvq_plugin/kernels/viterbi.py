"""Text of encode_trellis.h that depends on a trellis code: distances to subsets, and eight steps of the register.

Every pair of a lane's states is a variable and every subset a constant, up to what the lane's own bits contribute. A
pair are two states that differ in one place, their costs two half precision numbers: the squared error of the
path that these choose is within 0.04% of that of float32 (`benchmarks/trellis.py --losses`).
"""

from __future__ import annotations

from .codes import CodeLayout

LANES = 8  # of a token
STATE_BITS = 5  # places of the register whose bits count the states of a lane; the others count lanes
PAIR_PLACE = 4  # the place in which the two states of a pair differ: the low half of a word has the one without its bit


def _column(layout: CodeLayout, age: int) -> int:
    """What the bit of the channel `age` channels before contributes to coded bits."""
    return sum((generator >> age & 1) << i for i, generator in enumerate(layout.generators))


def _part(layout: CodeLayout, state: int, phase: int) -> int:
    """Coded bits of the places of a lane's state, but for that of the phase."""
    part = 0
    for place in range(STATE_BITS):
        if place != phase and state >> place & 1:
            part ^= _column(layout, (phase - place) % 8)
    return part


def _lane_parts(layout: CodeLayout) -> str:
    """Coded bits of the places that count lanes, four bits for each phase; a lane's states have the bit they drop."""
    text = "0u"
    for k in range(8 - STATE_BITS):
        place, packed = STATE_BITS + k, 0
        for phase in range(8):
            both = _column(layout, 0) ^ _column(layout, 8)
            packed |= (both if place == phase else _column(layout, (phase - place) % 8)) << (4 * phase)
        text += f" ^ ((sub >> {k} & 1) != 0 ? 0x{packed:08x}u : 0u)"
    return text


def _step(layout: CodeLayout, phase: int, decides: bool) -> str:
    subsets, newest, dropped = 2 ** len(layout.generators), _column(layout, 0), _column(layout, 8)
    text = f"{{ const int at = {phase * subsets} + (int)(parts >> {4 * phase} & {subsets - 1}u);\n"
    text += "".join(f"const kvq_uint d{s} = distance[at ^ {s}];\n" for s in range(subsets))
    pairs = range(1 << PAIR_PLACE)
    if phase < PAIR_PLACE:
        for zero in (pair for pair in pairs if not pair >> phase & 1):
            one, part = zero | 1 << phase, _part(layout, zero, phase)
            for pair, to in ((zero, part), (one, part ^ newest)):
                text += f"const kvq_uint a{pair} = kvq_hadd2(c[{zero}], d{to}), "
                text += f"b{pair} = kvq_hadd2(c[{one}], d{to ^ dropped});\n"
    elif phase == PAIR_PLACE:  # both states that a pair comes from are in it
        for pair in pairs:
            part = _part(layout, pair, phase)
            text += f"const kvq_uint a{pair} = kvq_hadd2(kvq_low_halves(c[{pair}], c[{pair}]), d{part}), "
            text += f"b{pair} = kvq_hadd2(kvq_high_halves(c[{pair}], c[{pair}]), d{part ^ dropped});\n"
    else:
        lane_bit = 1 << (phase - STATE_BITS)
        for pair in pairs:
            part = _part(layout, pair, phase)
            text += f"const kvq_uint a{pair} = kvq_hadd2(c[{pair}], d{part}), "
            text += f"b{pair} = kvq_hadd2(kvq_shuffle_xor_uint(c[{pair}], {lane_bit}), d{part ^ dropped});\n"
    if decides:
        # The sign of a difference says which is less: both half words take one after the other.
        text += "kvq_uint word = 0u;\n"
        for pair in pairs:
            text += f"word = kvq_select(0x80008000u, kvq_hsub2(b{pair}, a{pair}), word >> 1);\n"
        if phase >= STATE_BITS:
            text += f"if ((sub & {lane_bit}) != 0) word = ~word;\n"
        text += f"oldest[{phase}] = word;\n"
    return text + "".join(f"c[{pair}] = kvq_hmin2(a{pair}, b{pair});\n" for pair in pairs) + "}\n"


def viterbi_text(side: str, layout: CodeLayout) -> str:
    """Functions of a side.

    * `<side>_parts(sub)`: of lane `sub` of a token's, for `<side>_steps`
    * `<side>_steps(distance, parts, sub, c, oldest)`: costs `c` of a lane's 16 pairs of states after eight channels,
      from those before, and for each channel a word of what each state dropped
    * `<side>_first_steps(distance, parts, sub, c)`: the costs alone
    * `<side>_column(age)`: coded bits that the trellis bit `age` channels before contributes
    """
    columns = "".join(f"age == {age} ? {_column(layout, age)} : " for age in range(8))
    return (
        f"KVQ_FUNC kvq_uint {side}_parts(int sub) {{ return {_lane_parts(layout)}; }}\n"
        f"KVQ_FUNC int {side}_column(int age) {{ return {columns}{_column(layout, 8)}; }}\n"
        f"KVQ_FUNC void {side}_steps(KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE kvq_uint* c, KVQ_PRIVATE kvq_uint* oldest) {\n"
        + "".join(_step(layout, phase, True) for phase in range(8))
        + f"}}\nKVQ_FUNC void {side}_first_steps(KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE kvq_uint* c) {\n" + "".join(_step(layout, phase, False) for phase in range(8)) + "}\n"
    )


def no_viterbi_text(side: str) -> str:
    """The same names for a side without a trellis code, which calls none of them."""
    return (
        f"KVQ_FUNC kvq_uint {side}_parts(int sub) {{ return 0u; }}\n"
        f"KVQ_FUNC int {side}_column(int age) {{ return 0; }}\n"
        f"KVQ_FUNC void {side}_steps(KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE kvq_uint* c, KVQ_PRIVATE kvq_uint* oldest) {}\n"
        f"KVQ_FUNC void {side}_first_steps(KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE kvq_uint* c) {}\n"
    )
