"""The benchmark's output: growth, tables, pictures, and the files of results."""

from bench import sweeps, tables
from bench.measure import COMPILE, LIMIT
from bench.pictures import draw
from bench.store import Store, parse, slug
from bench.timing import Spread


def test_growth():
    cache = 1 << 20
    sizes = [4**power for power in range(12)]
    overhead = [(x, 1e-4 + 1e-9 * x) for x in sizes]
    assert sweeps.growth(overhead, 4, cache).verdict == "linear"
    out_of_cache = [(x, t * (1 if 4 * x <= cache else 2)) for x, t in overhead]
    assert sweeps.growth(out_of_cache, 4, cache).verdict == "linear"
    square = [(x, 1e-4 + 1e-9 * x**1.5) for x in sizes]
    assert sweeps.growth(square, 4, cache).verdict.startswith("cliff")
    cliff = [(x, t * (1 if x < sizes[-1] else 3)) for x, t in overhead]
    assert sweeps.growth(cliff, 4, cache).verdict == f"cliff at {sizes[-1]}"


def test_numbers_and_names():
    assert [tables.number(value) for value in (0.0, 1234.5, 12.345, 0.01234, 2e-5, "", 7)] == [
        "0", "1,234", "12.3", "0.0123", "2.0e-05", "-", "7",
    ]  # fmt: skip
    assert [parse(text) for text in ("12", "-1.5", "1e-05", "", "32 x 8", "torch.compile")] == [
        12, -1.5, 1e-5, "", "32 x 8", "torch.compile",
    ]  # fmt: skip
    about = {"device": "AMD EPYC(TM) 7763 @ 2.4", "threads": [1, 2]}
    assert slug(about, "cpu") == "amd-epyc-7763-2-4-2-threads"


def test_store_replaces_rows_and_keeps_the_others(tmp_path):
    store = Store(tmp_path, keep=False)
    store.add("ops", [{"op": "a", "case": "1", "both_ms": 1.0}, {"op": "b", "case": "1", "both_ms": 2.0}])
    store.add("ops", [{"op": "a", "case": "1", "both_ms": 3.0, "note": "new"}])
    again = Store(tmp_path, keep=True)
    assert {(row["op"], row["both_ms"], row["note"]) for row in again.rows("ops")} == {
        ("a", 3.0, "new"),
        ("b", 2.0, ""),
    }
    assert again.has("ops", ("b", "1"))
    assert not Store(tmp_path, keep=False).rows("ops")


def test_pictures_and_tables_of_a_whole_run(tmp_path):
    """Made-up results of two numbers of threads: every picture and every table."""

    def row(op, case, threads, provider, milliseconds):
        low, middle, high = Spread(0.9 * milliseconds, milliseconds, 1.1 * milliseconds)
        counts = dict.fromkeys(("bytes_forward", "bytes_backward", "peak_bytes", "saved_bytes"), 4096)
        counts |= {"launches_forward": 1, "launches_backward": 1, "latent_bytes": 1024}
        times = {"forward_ms": middle, "backward_ms": middle, "both_ms_low": low, "both_ms": middle}
        speed_ups = {f"speed_up{end}": 8 / x for end, x in (("_low", high), ("", middle), ("_high", low))}
        facts = {"op": op, "case": case, "threads": threads, "provider": provider, "both_ms_high": high}
        return facts | times | speed_ups | counts

    store = Store(tmp_path, keep=False)
    providers = ("eager", "torch.distributions", COMPILE, "fastkl", LIMIT)
    for op in ("kl_normal", "rsample_kl"):
        for case in ("1 x 1", "512 x 512", "4096 x 8192"):
            store.add("ops", [row(op, case, n, p, 8.0 / (i + 1)) for n in (1, 2) for i, p in enumerate(providers)])
    for sweep in sweeps.SWEEPS.values():
        for x in (1, 64, 4096):
            rows = [row(sweep.name, f"{sweep.axis} = {x}", 2, p, 1 + x / 100) for p in ("eager", "fastkl")]
            store.add("sweeps", [{**r, "axis": sweep.axis, "x": x, "ns_per_element": 1.0} for r in rows])
    steps = [row("large-latent", "whole step", 2, p, 100.0) for p in ("eager", "fastkl")]
    store.add("training_step", [{**r, "batch": "4 x 1 x 128 x 128"} for r in steps])
    again = Store(tmp_path, keep=True)  # as they come from disk
    assert set(draw(again, {"device": "a machine"})) == {"bench_sizes", "bench_ops", "bench_costs", "bench_sweeps"}
    found = tables.all_tables(again)
    assert [table.title for table in found] == [
        "KL, and sample + KL: forward and backward, float32", "Every op, on 2 threads", "Every op, on 1 thread",
        "Growth", "A training step with a large latent",
    ]  # fmt: skip
    # Speed-ups of torch.distributions, torch.compile, fastkl and the limit, and fastkl over torch.compile.
    assert found[0].rows[0] == [
        "KL",
        "1 x 1",
        "1",
        "8",
        "2x",
        "3x",
        "4x",
        "5.56x",
        "1.33x",
    ]  # the limit's upper quartile
    assert all(len(cells) == len(table.header) for table in found for cells in table.rows)
