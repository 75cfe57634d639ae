"""Text of encode_trellis.h that depends on a trellis code: distances to subsets, and eight steps of the register.

Every state of a lane is a variable and every subset a constant, up to what the lane's own bits contribute.
"""

from __future__ import annotations

from .codes import CodeLayout

LANES = 8  # of a token
STATE_BITS = 5  # places of the register whose bits count the states of a lane; the others count lanes


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
    text += "".join(f"const float d{s} = distance[at ^ {s}];\n" for s in range(subsets))
    states = range(1 << STATE_BITS)
    if phase < STATE_BITS:
        for zero in (state for state in states if not state >> phase & 1):
            one, part = zero | 1 << phase, _part(layout, zero, phase)
            for state, to in ((zero, part), (one, part ^ newest)):
                text += f"const float a{state} = c[{zero}] + d{to}, b{state} = c[{one}] + d{to ^ dropped};\n"
    else:
        lane_bit = 1 << (phase - STATE_BITS)
        for state in states:
            part = _part(layout, state, phase)
            text += f"const float a{state} = c[{state}] + d{part};\n"
            text += f"const float b{state} = kvq_shuffle_xor(c[{state}], {lane_bit}) + d{part ^ dropped};\n"
    if decides:
        # The sign of a difference says which is less: two words take one after the other, from the highest state on.
        text += "kvq_uint word = 0u, upper = 0u;\n"
        for state in reversed(range(len(states) // 2)):
            for name, own in (("word", state), ("upper", state + len(states) // 2)):
                text += f"{name} = kvq_funnel({name}, kvq_word_of(b{own} - a{own}), 1);\n"
        text += "word |= upper << 16;\n"
        if phase >= STATE_BITS:
            text += f"if ((sub & {lane_bit}) != 0) word = ~word;\n"
        text += f"oldest[{phase}] = word;\n"
    return text + "".join(f"c[{state}] = kvq_least(a{state}, b{state});\n" for state in states) + "}\n"


def viterbi_text(side: str, layout: CodeLayout) -> str:
    """Functions of a side.

    * `<side>_parts(sub)`: of lane `sub` of a token's, for `<side>_steps`
    * `<side>_steps(distance, parts, sub, c, oldest)`: costs `c` of a lane's 32 states after eight channels, from those
      before, and for each channel a word of what each state dropped
    * `<side>_first_steps(distance, parts, sub, c)`: the costs alone
    * `<side>_column(age)`: coded bits that the trellis bit `age` channels before contributes
    """
    columns = "".join(f"age == {age} ? {_column(layout, age)} : " for age in range(8))
    return (
        f"KVQ_FUNC kvq_uint {side}_parts(int sub) {{ return {_lane_parts(layout)}; }}\n"
        f"KVQ_FUNC int {side}_column(int age) {{ return {columns}{_column(layout, 8)}; }}\n"
        f"KVQ_FUNC void {side}_steps(KVQ_GROUP_MEMORY const float* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE float* c, KVQ_PRIVATE kvq_uint* oldest) {\n"
        + "".join(_step(layout, phase, True) for phase in range(8))
        + f"}}\nKVQ_FUNC void {side}_first_steps(KVQ_GROUP_MEMORY const float* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE float* c) {\n" + "".join(_step(layout, phase, False) for phase in range(8)) + "}\n"
    )


def no_viterbi_text(side: str) -> str:
    """The same names for a side without a trellis code, which calls none of them."""
    return (
        f"KVQ_FUNC kvq_uint {side}_parts(int sub) {{ return 0u; }}\n"
        f"KVQ_FUNC int {side}_column(int age) {{ return 0; }}\n"
        f"KVQ_FUNC void {side}_steps(KVQ_GROUP_MEMORY const float* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE float* c, KVQ_PRIVATE kvq_uint* oldest) {}\n"
        f"KVQ_FUNC void {side}_first_steps(KVQ_GROUP_MEMORY const float* distance, kvq_uint parts, int sub, "
        "KVQ_PRIVATE float* c) {}\n"
    )
