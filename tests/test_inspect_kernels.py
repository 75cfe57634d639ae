"""`kvq inspect --kernels`: what runs on this device, and every reason why it is no kernel."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mlx_kvq_plugin.cli import main
from mlx_kvq_plugin.codecs import get_codec
from mlx_kvq_plugin.kernels import build, choices, dispatch, sides
from mlx_kvq_plugin.kernels.attend import Call
from mlx_kvq_plugin.kernels.dispatch import fitting_launch
from mlx_kvq_plugin.kernels.launch import Launch, launch_sizes, table
from mlx_kvq_plugin.schemes import parse_scheme


def found(scheme: str, dims: tuple[int, int] = (128, 128), repeat: int = 4) -> tuple[choices.Choice, ...]:
    return choices.choices(parse_scheme(scheme).layer_spec(), *dims, repeat)


def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (choices, dispatch, sides, build):
        monkeypatch.setattr(module, "backend", lambda: build.CUDA)


def test_without_a_gpu_that_is_the_reason() -> None:
    for choice in found("tq4"):
        assert choice.reasons == (choices.NO_GPU,)
        assert "plain" in choice.runs


def test_on_a_gpu_kernels_run_where_codecs_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch)
    assert all(not choice.reasons for scheme in ("tq4", "rvq1", "k=tq6,v=rvq3") for choice in found(scheme))
    assert found("k=tq4,v=affine4")[0].reasons == ("codec affine4 has no kernel",)
    assert found("tq4,rotation=dense")[2].reasons == ("rotation dense has no kernel",)
    assert found("tq4", (96, 128))[0].reasons == ("head size 96 has no kernel",)
    assert "more than 16" in found("tq4", repeat=17)[0].reasons[0]
    assert found("tq4", repeat=17)[1].reasons == ()
    assert found("identity")[0].reasons == ()


def test_the_command_prints_layers_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo:smollm2", "--kernels", "--kv-scheme", "tq4", "--kv-scheme", "affine4,edges=1"]) == 0
    text = capsys.readouterr().out
    assert "on cpu" in text
    assert "launch sizes" in text
    assert "layers 0-29: tq4, 9/3 heads of 64/64 channels" in text
    assert "layers 0, 29: left to mlx-lm" in text
    assert f"no kernel: {choices.NO_GPU}; codec affine4 has no kernel" in text
    assert main(["inspect", "demo:smollm2", "--kernels", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == "cpu"
    assert {row["scheme"] for row in report["schemes"]} == {"tq4", "rvq1"}


def test_launch_sizes_of_unknown_devices_are_the_default() -> None:
    sizes = table()
    assert launch_sizes("a device that nobody has") == Launch(**sizes["default"])
    for name in sizes:
        launch = launch_sizes(name)
        assert 32 * launch.warps <= 1024


def test_kernels_that_need_registers_get_fewer_groups() -> None:
    launch = Launch(warps=4, groups_per_core=3, groups=396)
    few = Call(1, 0, 8, 4, 1, 128, 128, "kvq_bfloat", "kvq_bfloat", 0.1, 0.0, False, (), "", "")
    three, four = get_codec("tq3"), get_codec("tq4")
    assert fitting_launch(few, three, three, launch) == launch
    fewer = Launch(warps=4, groups_per_core=2, groups=264)
    assert fitting_launch(few, four, three, launch) == fitting_launch(few, three, four, launch) == fewer
    for other in (replace(few, repeat=8), replace(few, queries=2), replace(few, value_dim=256)):
        assert fitting_launch(other, three, three, launch) == fewer
    assert fitting_launch(few, four, four, Launch(groups_per_core=1, groups=132)).groups == 132
