"""Tile sizes: a table wins over the rule, wrong tables are refused, and tuning finds what a fake clock makes fast."""

import json

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("gpt2fast._ptx", reason="gpt2fast._ptx is not built")

from gpt2fast import cli
from gpt2fast.benchmarks import tune
from gpt2fast.benchmarks.gpu_stages import Where
from gpt2fast.kernels import linear, tiles
from gpt2fast.testing import ptx

KEY, OWN, OTHER = (512, False), (64, 64, 64, 4, 4), (32, 64, 64, 4, 2)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table that GPT2FAST_TILES names. Tiles that were found before are forgotten."""

    def write(content):
        path = tmp_path / "tiles.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv("GPT2FAST_TILES", str(path))
        tiles.read.cache_clear()
        for known in tiles.KNOWN.values():
            monkeypatch.setattr(known, "_found", {})
        return path

    yield write
    tiles.read.cache_clear()


def launched(rows=100):
    x, weight = torch.randn(rows, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    with ptx.machine() as machine:
        linear.linear(x, weight)
    return machine.launches[0].grid[0]


def test_a_table_comes_before_the_rule(table):
    assert launched() == 2  # tiles of 64 x 64
    table(dict(sm_80={"linear_kernel": {"512, false": OTHER}}))
    assert launched() == 4  # tiles of 32 x 64
    table(dict(sm_90={"linear_kernel": {"512, false": OTHER}}))
    assert launched() == 2
    table(dict(sm_80={"linear_kernel": {"512, true": OTHER}}))
    assert launched() == 2


@pytest.mark.parametrize(
    "content, said",
    (
        ("{", "must be a file of JSON"),
        (dict(sm_80={"line_kernel": {}}), "kernel must be one of linear_kernel, .*, got 'line_kernel'"),
        (dict(sm_80={"linear_kernel": {"16, true": [64, 64]}}), r"sm_80, linear_kernel, 16, true must be \[BLOCK_M, "),
        (dict(sm_80={"linear_kernel": {"16, true": [64, 48, 64, 4, 4]}}), r"got \[64, 48, 64, 4, 4\]"),
        (dict(sm_80={"linear_kernel": {"16, true": [64, 64, 64, 4, 9]}}), "stages 1 to 8"),
        (dict(sm_80={"linear_kernel": {"16, true": [64, 64, 64, 3, 4]}}), "warps 1 to 16"),
    ),
)
def test_no_table(table, content, said):
    table(content)
    with pytest.raises(ValueError, match=said):
        launched()


def test_a_table_that_is_not_there(table, monkeypatch, tmp_path):
    table({})
    monkeypatch.setenv("GPT2FAST_TILES", str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="must be a file of JSON, got .*none.json"):
        launched()


def test_the_shipped_table_is_one():
    assert tiles.read(tiles.sources()[-1])["gfx942"]


def test_every_key_that_is_tuned_is_one_that_a_kernel_asks_for(monkeypatch):
    """The call of a key launches the kernel, and uses the tile of the key."""
    asked = []
    for job in tune.jobs():
        if job.key[0] in (256, 8192) or job.dtype == torch.float32:
            continue  # the same as the others, but large
        contest = Small(job, Where(True), lambda calls: {name: [1.0] for name in calls})
        monkeypatch.setattr(contest.tiles, "rule", lambda *key: asked.append(key))
        contest.tiles._found.pop(job.key, None)
        with ptx.machine(), pytest.raises(TypeError):  # None is no tile
            contest.function(**contest.args)
        assert asked[-1] == job.key
        monkeypatch.undo()


class Small(tune.Contest):
    """A contest with few rows that runs nothing when it is made."""

    def __init__(self, job, where, clock):
        case = {k: min(v, 20) if k in "TS" and type(v) is int else v for k, v in job.case.items()}
        case |= dict(T=job.key[0]) if job.op == "linear" else {}
        case |= {k: 1 for k in ("B", "H") if k in case} | {k: 32 for k in "KN" if k in case}
        super().__init__(tune.Job(job.kernel, job.key, job.op, case, job.dtype), where, clock)

    def measure(self, tile):
        return 1.0


def by_work(calls):
    """A clock without time: it counts the warp instructions of the launches."""
    times = {}
    for name, call in calls.items():
        before = len(ptx.active().launches)
        call()
        made = ptx.active().launches[before:]
        times[name] = 3 * [float(sum(launch.counters["warp_instructions"] for launch in made))]
    return times


JOB = tune.Job("linear_kernel", KEY, "linear", dict(B=1, T=33, K=32, N=64, bias=True), torch.bfloat16)


def test_search_goes_to_the_fastest(tmp_path, table):
    """With 33 rows, a tile of 64 computes many rows in vain. What is found is listed, and the table is used."""
    (row,) = tune.tune([JOB], Where(True), by_work, 600)
    assert row["listed"] and row["own"] == OWN and row["ratio"]["median"] > 1.03, row
    assert row["tried"] > 5 and row["tile"][2] == 32  # K is 32
    path = tmp_path / "found.json"
    path.write_text(json.dumps(dict(sm_70=dict(linear_kernel={"16, true": OTHER}))))
    tune.write([row], "sm_80", path)
    found = json.loads(path.read_text())
    assert found["sm_80"]["linear_kernel"] == {"512, false": list(row["tile"])} and "sm_70" in found
    table(path.read_text())
    with ptx.machine():
        assert linear.tile(*KEY) == row["tile"]


def test_wrong_and_impossible_tiles_do_not_count(monkeypatch):
    """A tile that gives wrong results or does not run is no candidate, however fast it is."""
    real = tune.Contest.call

    def call(self, tile):
        if tile[0] == 32:
            raise RuntimeError("out of resource: shared memory")
        out = real(self, tile)
        return tuple(t + 1 for t in out) if tile != OWN else out

    monkeypatch.setattr(tune.Contest, "call", call)
    (row,) = tune.tune([JOB], Where(True), lambda calls: {n: [1e-9] for n in calls}, 600)
    assert row["tile"] == OWN and row["tried"] == 0 and row["refused"] >= 6 and not row["listed"]
    assert "stays; 0 others" in tune.describe(row)


def test_time_runs_out():
    assert not list(tune.tune([JOB], Where(True), by_work, -1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu(capsys):
    assert cli.main(["tune"]) == 1
    assert capsys.readouterr().err.strip() == "gpt2fast tune: there is no GPU to time kernels on"
