"""Tuned tiles: only candidates that can fit are tried, the fastest is kept on disk, and only TW_TILES brings it in."""

import pytest
import torch

from tests.support.attention_inputs import star
from tests.support.tolerances import Case, check_case
from tw_kernels.trie_attention import config
from tw_kernels.trie_attention import tune as tune_module
from tw_kernels.trie_attention.config import PLAN_BLOCK, TileConfig, pick_config, read_tuned, tuning_key
from tw_kernels.trie_attention.tune import (
    accumulators,
    answers_of_a_prompt,
    candidates,
    main,
    search,
    shared_bytes,
    tune,
    write_tuned,
)

KERNELS = ("forward", "dq", "dkv")
HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TW_TILES", raising=False)
    caches = (read_tuned, config._triton_version)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("dims", "limit", "capability"), [((128, 128), 232_448, HOPPER), ((192, 128), 101_376, (8, 6))]
)
def test_candidates_fit_and_the_table_comes_first(kernel, dims, limit, capability) -> None:
    found = candidates(kernel, *dims, torch.bfloat16, limit, capability)
    assert found[0] == pick_config(*dims, torch.bfloat16, capability, kernel)
    assert 10 <= len(set(found)) == len(found) <= 100
    for tiles in found[1:]:
        assert shared_bytes(tiles, kernel, *dims, 2) <= limit
        assert accumulators(tiles, kernel, *dims) <= tune_module.ACCUMULATORS
        assert PLAN_BLOCK % tiles.block_m == PLAN_BLOCK % tiles.block_n == 0
        assert capability >= HOPPER or not tiles.tma
    small = candidates(kernel, *dims, torch.bfloat16, 60_000, capability)
    assert set(small[1:]) < set(found)


def test_the_fastest_that_runs_is_found() -> None:
    times = {32: 3.0, 64: 2.0, 128: 1.0}

    def measure(kernel: str, tiles: TileConfig) -> float:
        if tiles.num_stages == 3:
            raise MemoryError("out of resources")
        return times[tiles.block_m]

    tried = [TileConfig(m, 32, 4, stages) for m in times for stages in (2, 3)]
    assert search("forward", tried, measure) == (TileConfig(128, 32, 4, 2), 1.0)
    with pytest.raises(RuntimeError, match=r"none of 1 tiles of the dq kernel runs .*MemoryError: out of resources"):
        search("dq", tried[1:2], measure)


def test_tuned_tiles_are_used_where_they_were_measured(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "tiles.json"
    ours, other = TileConfig(32, 32, 4, 1), TileConfig(64, 32, 4, 1, tma=True)
    write_tuned(path, {tuning_key(128, 128, torch.bfloat16, HOPPER, "forward"): other})
    write_tuned(path, {tuning_key(128, 128, torch.bfloat16, HOPPER, "dkv"): other})
    write_tuned(path, {tuning_key(128, 128, torch.bfloat16, HOPPER, "forward"): ours})
    known = pick_config(128, 128, torch.bfloat16, HOPPER, "forward")
    assert known != ours
    monkeypatch.setenv("TW_TILES", str(path))
    assert pick_config(128, 128, torch.bfloat16, HOPPER, "forward") == ours
    assert pick_config(128, 128, torch.bfloat16, HOPPER, "dkv") == other
    assert pick_config(128, 128, torch.float16, HOPPER, "forward") == known
    assert pick_config(128, 128, torch.bfloat16, (12, 0), "forward") != ours
    assert pick_config(64, 64, torch.bfloat16, HOPPER, "forward") != ours
    monkeypatch.setattr(config, "_triton_version", lambda: "another")
    assert pick_config(128, 128, torch.bfloat16, HOPPER, "forward") == known


@pytest.mark.parametrize("text", [None, "{", "[1]", '{"a": {"block_m": 64}}', '{"a": 3}'])
def test_a_file_that_is_none_of_ours_is_an_error(text: str | None, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("TW_TILES", str(path))
    with pytest.raises(ValueError, match=r"TW_TILES must name a file that .*, got .*; write it, or unset TW_TILES"):
        pick_config(64, 64, torch.float16, HOPPER, "forward")


def test_the_version_of_triton_is_asked_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(config, "version", lambda name: asked.append(name) or "1")
    write_tuned(tmp_path / "tiles.json", {})
    monkeypatch.setenv("TW_TILES", str(tmp_path / "tiles.json"))
    for kernel in KERNELS:
        pick_config(64, 64, torch.float16, HOPPER, kernel)
    assert asked == ["triton"]


def test_tuning_starts_from_the_table(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With TW_TILES set, the tiles tuned before stood for the table: its own were no candidate any more."""
    known = candidates("dq", 64, 64, torch.float16, 232_448)
    path, tuned = tmp_path / "tiles.json", TileConfig(16, 16, 4, 1, head_slowest=False)
    write_tuned(path, {tuning_key(64, 64, torch.float16, HOPPER, "dq"): tuned})
    monkeypatch.setenv("TW_TILES", str(path))
    assert pick_config(64, 64, torch.float16, HOPPER, "dq") == tuned
    assert candidates("dq", 64, 64, torch.float16, 232_448) == known
    assert known[0] == config.table_config(64, 64, torch.float16, HOPPER, "dq")


def test_tiles_that_do_not_divide_a_block_are_refused(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiles.json"
    write_tuned(path, {"a": TileConfig(48, 64, 4, 1)})
    monkeypatch.setenv("TW_TILES", str(path))
    with pytest.raises(ValueError, match=r"tiles must divide 128, got TileConfig\(block_m=48"):
        pick_config(64, 64, torch.float16, HOPPER, "forward")


def test_the_trie_to_measure_on() -> None:
    assert answers_of_a_prompt(3, 2, 2).tolist() == star(3, [2, 2]).subtree_end.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys) -> None:
    with pytest.raises(RuntimeError, match="tune measures on a CUDA device, got none"):
        tune(64, path=tmp_path / "tiles.json")
    assert main(["--head-dim", "64", "--out", str(tmp_path / "tiles.json")]) == 1
    assert "tune: tune measures on a CUDA device" in capsys.readouterr().err


def test_heads_are_two_numbers(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--head-dim", "64", "--out", str(tmp_path / "t.json"), "--heads", "32"])
    assert "--heads must be two numbers such as 32,8 (query heads, key heads), got '32'" in capsys.readouterr().err


@pytest.mark.gpu
def test_tuning_on_the_gpu_keeps_the_kernels_exact(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "candidates", lambda *args: candidates(*args)[::12])
    path, said = tmp_path / "tiles.json", []
    best = tune(64, heads=(4, 2), subtree_end=answers_of_a_prompt(300, 3, 200), path=path, report=said.append)
    assert list(best) == list(KERNELS)
    assert [line.split(":")[0] for line in said] == list(KERNELS)
    monkeypatch.setenv("TW_TILES", str(path))
    check_case(Case(star(300, [20, 150, 77]), heads=(4, 2), dims=(64, 64)), "triton", torch.bfloat16, "cuda")
