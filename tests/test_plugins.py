"""Discovery: what entry points offer, loaded only when asked for, and every way in which a plugin can be wrong."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlx_kvq_plugin import plugins
from mlx_kvq_plugin.adapters import GROUP as ADAPTERS
from mlx_kvq_plugin.adapters import list_adapters, load_adapter
from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.codecs import GROUP as CODECS
from mlx_kvq_plugin.codecs import get_codec, list_codecs
from mlx_kvq_plugin.config import KVQConfig
from mlx_kvq_plugin.errors import CodecError, KVQError, PluginError, SchemeError
from mlx_kvq_plugin.inventory import list_plugins
from mlx_kvq_plugin.schemes import GROUP as SCHEMES
from mlx_kvq_plugin.schemes import list_schemes, parse_scheme

CODEC = """
from dataclasses import dataclass
from typing import ClassVar
from mlx_kvq_plugin.codecs.identity import Identity

@dataclass(frozen=True)
class Outside(Identity):
    family: ClassVar[str] = "{family}"
    suffixes: ClassVar[tuple[str, ...]] = {suffixes}
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs small distributions for one test: `install(dist, group, {name: value}, source)` returns the module."""
    before = set(sys.modules)
    count = 0

    def install(dist: str, group: str, entries: dict[str, str], source: str = "", folder: str = "site") -> str:
        nonlocal count
        count += 1
        module = f"kvq_outside_{tmp_path.name}_{count}"
        site = tmp_path / folder
        info = site / f"{dist}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        lines = [f"{name} = {value.format(module=module)}" for name, value in entries.items()]
        (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(lines) + "\n")
        (site / f"{module}.py").write_text(source)
        if str(site) not in sys.path:
            monkeypatch.syspath_prepend(str(site))
        forget()
        return module

    yield install
    monkeypatch.undo()
    for module in set(sys.modules) - before:
        if module.startswith("kvq_outside_"):
            del sys.modules[module]
    forget()


def forget() -> None:
    plugins.refresh()
    get_codec.cache_clear()


def codec_source(family: str, suffixes: tuple[str, ...] = ("",)) -> str:
    return CODEC.format(family=family, suffixes=suffixes)


def message_of(kind: type[KVQError], action: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_outside_codec_is_found_like_a_built_in_one(install: Install) -> None:
    module = install("outside", CODECS, {"mine": "{module}:Outside"}, codec_source("mine", ("", "2")))
    assert "mine" in list_codecs()
    assert type(get_codec("mine")).__module__ == module
    assert parse_scheme("mine2,edges=1").key == "mine2"
    assert plugins.plugin_origin(CODECS, "mine") == f"{module}:Outside from outside"
    assert message_of(CodecError, lambda: get_codec("mine3")).endswith("choose one of mine, mine2")


def test_the_built_in_ones_are_entry_points_too() -> None:
    assert plugins.plugin_origin(CODECS, "tq") == "mlx_kvq_plugin.codecs.turboquant:TurboQuant from mlx-kvq-plugin"
    assert plugins.plugin_origin(ADAPTERS, "llama") == "model_adapters.llama:ADAPTER from mlx-kvq-plugin"


def test_nothing_is_imported_before_it_is_asked_for(install: Install) -> None:
    good = install("good", CODECS, {"good": "{module}:Outside"}, codec_source("good"))
    bad = install("bad", CODECS, {"bad": "{module}:Outside"}, "raise RuntimeError('must not be imported')")
    assert {"good", "bad"} <= set(list_codecs())
    get_codec("tq4")
    message_of(CodecError, lambda: get_codec("unknown"))
    plugins.plugin_origin(CODECS, "bad")
    assert good not in sys.modules and bad not in sys.modules
    get_codec("good")
    assert good in sys.modules and bad not in sys.modules


def test_importing_the_package_imports_no_codec_and_no_adapter() -> None:
    script = (
        "import sys, mlx_kvq_plugin; from mlx_kvq_plugin.codecs import list_codecs; "
        "from mlx_kvq_plugin.adapters import list_adapters; assert list_codecs() and list_adapters(); "
        "print(*(m for m in sys.modules if m.startswith(('mlx_kvq_plugin.codecs.', 'model_adapters'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_one_broken_plugin_does_not_disturb_the_others(install: Install) -> None:
    install("bad", CODECS, {"bad": "{module}:Outside"}, "raise RuntimeError('boom')")
    message_of(PluginError, lambda: get_codec("bad"))
    assert get_codec("tq4").name == "tq4"
    assert parse_scheme("rvq1").key == "rvq1"


@pytest.mark.parametrize(
    ("value", "source", "reason"),
    [
        ("{module}:Outside", "raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("{module}:Outside", "import a_module_that_is_not_there", "ModuleNotFoundError: No module named"),
        ("{module}:Outside", "def broken(:", "SyntaxError: "),
        ("{module}:Missing", "", "AttributeError: "),
        ("no_such_module_at_all:Outside", "", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    ],
)
def test_a_plugin_that_does_not_import_is_named_with_its_error(
    install: Install, value: str, source: str, reason: str
) -> None:
    module = install("broken-dist", CODECS, {"broken": value}, source)
    message = message_of(PluginError, lambda: get_codec("broken"))
    origin = value.format(module=module) + " from broken-dist"
    assert message.startswith(f"entry point 'broken' ({origin}) must import, got {reason}")
    assert message.endswith("; fix or uninstall that plugin")


def test_a_broken_plugin_in_a_scheme_is_a_scheme_error_that_names_it(install: Install) -> None:
    install("broken-dist", CODECS, {"broken": "{module}:Outside"}, "raise RuntimeError('no luck')")
    message = message_of(SchemeError, lambda: parse_scheme("k=tq4,v=broken"))
    assert "from broken-dist) must import, got RuntimeError: no luck" in message


def test_two_owners_of_one_name_are_both_named(install: Install) -> None:
    modules = [install(dist, CODECS, {"shared": "{module}:Outside"}, codec_source("shared")) for dist in ("one", "two")]
    assert list_codecs().count("shared") == 1
    message = message_of(PluginError, lambda: get_codec("shared"))
    assert message.startswith(f"entry point 'shared' in group {CODECS} must have one owner, got ")
    assert f"{modules[0]}:Outside from one" in message and f"{modules[1]}:Outside from two" in message
    assert message.endswith("; uninstall one of them")
    assert not set(modules) & set(sys.modules)  # neither was imported to find that out


def test_a_built_in_name_cannot_be_taken_over(install: Install) -> None:
    install("thief", CODECS, {"tq": "{module}:Outside"}, codec_source("tq", ("4",)))
    message = message_of(PluginError, lambda: get_codec("tq4"))
    assert "from mlx-kvq-plugin" in message and "from thief" in message
    assert get_codec("rvq1").name == "rvq1"


def test_a_built_in_codec_cannot_be_taken_over_by_a_longer_family(install: Install) -> None:
    """Family `tq` with suffix `4` and family `tq4` are two owners of the name tq4."""
    install("thief", CODECS, {"tq4": "{module}:Outside"}, codec_source("tq4"))
    with pytest.raises((PluginError, CodecError)):
        get_codec("tq4")


def test_a_longer_family_has_its_own_names(install: Install) -> None:
    module = install("outside", CODECS, {"tqx": "{module}:Outside"}, codec_source("tqx", ("4",)))
    assert type(get_codec("tqx4")).__module__ == module
    assert type(get_codec("tq4")).__module__ == "mlx_kvq_plugin.codecs.turboquant"


def test_one_distribution_on_two_paths_is_no_clash(install: Install, tmp_path: Path) -> None:
    install("outside", CODECS, {"mine": "outside_codec:Outside"}, folder="a")
    install("outside", CODECS, {"mine": "outside_codec:Outside"}, folder="b")
    (tmp_path / "a" / "outside_codec.py").write_text(codec_source("mine"))
    try:
        assert get_codec("mine").name == "mine"
        assert plugins.plugin_origin(CODECS, "mine") == "outside_codec:Outside from outside"
    finally:
        sys.modules.pop("outside_codec", None)


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("def Outside(): pass", "<function Outside"),
        ("Outside = 3", "3"),
        ("class Outside: pass", "<class '"),
        (
            "from mlx_kvq_plugin.codecs.identity import Identity; Outside = Identity()",
            "Identity(seed=0, rotation='hadamard', scaling='least_squares')",
        ),
    ],
)
def test_what_is_no_codec_class_is_refused(install: Install, source: str, got: str) -> None:
    install("outside", CODECS, {"wrong": "{module}:Outside"}, source)
    message = message_of(CodecError, lambda: get_codec("wrong"))
    assert message.startswith(f"entry point 'wrong' in {CODECS} must be a Codec subclass, got {got}")


def test_what_is_no_adapter_is_refused(install: Install) -> None:
    install("outside", ADAPTERS, {"mymodel": "{module}:ADAPTER"}, "ADAPTER = 'llama'")
    assert "mymodel" in list_adapters()
    message = message_of(PluginError, lambda: load_adapter("mymodel"))
    assert message == f"entry point 'mymodel' in {ADAPTERS} must be an Adapter, got 'llama'; fix that plugin"


def test_an_unknown_name_is_answered_with_what_is_installed() -> None:
    message = message_of(PluginError, lambda: plugins.load_plugin(CODECS, "nope"))
    assert message == f"entry point 'nope' must exist in group {CODECS}; installed are {', '.join(list_codecs())}"


def test_an_empty_group_asks_whether_the_package_is_installed() -> None:
    assert plugins.plugin_names("mlx_kvq_plugin.nothing") == []
    message = message_of(PluginError, lambda: plugins.load_plugin("mlx_kvq_plugin.nothing", "nope"))
    assert "installed are none (is mlx-kvq-plugin installed, not only on the path?)" in message


def test_a_plugin_installed_later_is_seen_after_a_refresh(install: Install) -> None:
    module = install("late", CODECS, {"late": "{module}:Outside"}, codec_source("late"))
    entries = Path(sys.path[0]) / "late-1.0.dist-info" / "entry_points.txt"
    assert {"late", "later"} & set(list_codecs()) == {"late"}
    entries.write_text(f"[{CODECS}]\nlate = {module}:Outside\nlater = {module}:Outside\n")
    assert {"late", "later"} & set(list_codecs()) == {"late"}
    plugins.refresh()
    assert {"late", "later"} & set(list_codecs()) == {"late", "later"}


# ---- named schemes ---------------------------------------------------------------------------------------------------


def test_schemes_named_by_a_plugin_are_schemes(install: Install) -> None:
    names = {"house-small": "k=tq3,v=tq2,edges=1", "house-long": "tq@2.5,recent=64"}
    module = install("house", SCHEMES, {"house": "{module}:SCHEMES"}, f"SCHEMES = {names!r}")
    parse_scheme("tq4")
    assert module not in sys.modules  # only those whose name a scheme begins with are loaded
    assert parse_scheme("house-small") == KVQConfig("tq3", "tq2", edges=1)
    assert parse_scheme("house-small,edges=3,seed=4") == KVQConfig("tq3", "tq2", edges=3, seed=4)
    assert parse_scheme("recent=8,house-long") == KVQConfig("tq@2.5", "tq@2.5", recent=8)
    rows = {row.name: row for row in list_schemes(128)}
    assert rows["house-small"].bits == 2.5 + 16 / 128 and rows["house-small"].note == "keys tq3, values tq2"
    assert rows["house-long"].bits is None  # bits on average are nobody's bits
    message_of(SchemeError, lambda: parse_scheme("house-large"))


def test_two_plugins_cannot_name_one_scheme(install: Install) -> None:
    install("one", SCHEMES, {"hou": "{module}:SCHEMES"}, "SCHEMES = {'house': 'tq4'}")
    install("two", SCHEMES, {"house": "{module}:SCHEMES"}, "SCHEMES = {'house': 'tq3'}")
    message = message_of(SchemeError, lambda: parse_scheme("house"))
    assert message == "scheme house must be named by one plugin, got tq4 and tq3; uninstall one"


@pytest.mark.parametrize(
    "source",
    [
        "SCHEMES = 3",
        "SCHEMES = ['house']",
        "SCHEMES = {'home': 'tq4'}",
        "SCHEMES = {'house': 4}",
        "SCHEMES = {4: 'tq4'}",
    ],
)
def test_what_names_no_schemes_is_refused(install: Install, source: str) -> None:
    install("house", SCHEMES, {"house": "{module}:SCHEMES"}, source)
    start = f"entry point 'house' in {SCHEMES} must be a mapping of names that begin with it to schemes, got "
    assert message_of(SchemeError, lambda: parse_scheme("house")).startswith(start)
    rows = {row.name: row for row in list_schemes(128)}
    assert rows["house"].bits is None and rows["house"].note.startswith(start)
    assert rows["tq4"].bits == 4.125


def test_a_broken_plugin_is_a_row_of_the_list(install: Install) -> None:
    install("badcodec", CODECS, {"bad": "{module}:Outside"}, "raise RuntimeError('no luck')")
    install("badschemes", SCHEMES, {"worse": "{module}:SCHEMES"}, "raise RuntimeError('none either')")
    rows = {row.name: row for row in list_schemes(128)}
    assert rows["tq4"].bits == 4.125 and rows["turbo4v4"].bits is not None
    for name, dist, reason in (("bad", "badcodec", "no luck"), ("worse", "badschemes", "none either")):
        assert rows[name].bits is None
        assert f"from {dist}) must import, got RuntimeError: {reason}; fix or uninstall" in rows[name].note
        assert rows[name].note == message_of(SchemeError, lambda name=name: parse_scheme(name))


# ---- kvq plugins -----------------------------------------------------------------------------------------------------


def test_all_plugins_are_listed_with_their_origin_and_state(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plugins"]) == 0
    assert "all load" in capsys.readouterr().out
    good = install("good", CODECS, {"mine": "{module}:Outside"}, codec_source("mine", ("2", "4")))
    install("wrong", ADAPTERS, {"odd": "{module}:ADAPTER"}, "ADAPTER = 3\n", folder="second")
    install("broken", SCHEMES, {"bad": "{module}:SCHEMES"}, "1 / 0\n", folder="third")
    install("unknown", SCHEMES, {"fancy": "{module}:SCHEMES"}, "SCHEMES = {'fancy1': 'nothing7'}\n", folder="fourth")
    install("twice", CODECS, {"tq": "{module}:Outside"}, codec_source("tq", ("9",)), folder="fifth")
    found = {(own.distribution, own.name): own for own in list_plugins()}
    mine = found["good", "mine"]
    assert (mine.value, mine.version, mine.offers, mine.problem) == (f"{good}:Outside", "1.0", ("mine2", "mine4"), "")
    problems = {key: own.problem for key, own in found.items() if own.problem}
    assert set(problems) == {
        ("wrong", "odd"),
        ("broken", "bad"),
        ("unknown", "fancy"),
        ("twice", "tq"),
        ("mlx-kvq-plugin", "tq"),
    }
    assert "must be an Adapter, got 3" in problems["wrong", "odd"]
    assert "ZeroDivisionError" in problems["broken", "bad"]
    assert "nothing7" in problems["unknown", "fancy"]
    assert problems["twice", "tq"] == problems["mlx-kvq-plugin", "tq"]
    assert "twice" in problems["twice", "tq"] and "mlx-kvq-plugin" in problems["twice", "tq"]

    assert main(["plugins"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("mlx-kvq-plugin ") and line.endswith("1 cannot be used") for line in lines)
    assert any("mine2, mine4" in line for line in lines)
    assert main(["plugins", "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == len(list_plugins()) and sum(bool(row["problem"]) for row in listed) == 5
