"""What `negpool bench mining` found, as tables and sentences."""

from typing import Any

from launch.tables import Part, Sheet, machine_words, rate_words


def mining_parts(found: dict[str, Any]) -> list[Part]:
    """Return encoding, search, a refresh and an index against the bare work, and what two ranks and the memory came to."""
    encoding, search = found["encoding"], found["search"]
    titles = {
        "encoding": f"encoding {encoding['texts']} texts, {encoding['tokens']:,} tokens, {encoding['precision']}, "
        f"{machine_words(found)}",
        "search": f"exact search, {_size(search)}",
    }
    parts: list[Part] = []
    for name, title in titles.items():
        parts.append(_sides(title, found[name]["sides"]))
        for other, rate in found[name]["our_rate_over"].items():
            parts.append(f"{rate['found']:.2f} of the rate of {other}; wanted {rate['wanted']:.2f}.")
        parts.append(
            f"{found[name]['share_of_matmul_rate']:.0%} of the rate of a large product. "
            + rate_words(found[name]["precision"], found[name]["matmul_gflops"])
        )
    return parts + _refresh_parts(found["refresh"]) + _ranks_parts(found) + _index_parts(found.get("index", {}))


def _refresh_parts(refresh: dict[str, Any]) -> list[Part]:
    title = (
        f"a whole refresh, {refresh['queries']:,} queries, {refresh['passages']:,} passages, {refresh['tokens']:,} tokens, "
        f"k {refresh['top_k']}, {refresh['precision']}"
    )
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in refresh["phases_s"].items())
    return [
        _sides(title, refresh["sides"]),
        f"A refresh takes {refresh['ratio']:.2f} of its bare parts; wanted at most {refresh['wanted']:.2f}. The last: {phases}.",
    ]


def _ranks_parts(found: dict[str, Any]) -> list[Part]:
    parts: list[Part] = []
    for name, times in found["ranks"]["speedup"].items():
        wanted = found["ranks"]["wanted"].get(name)
        parts.append(
            f"{name}: two ranks of one thread are {times:.2f} times one" + (f"; wanted {wanted:.2f}." if wanted else ", no more.")
        )
    idle = found["idle"]
    parts.append(
        f"A trainer's step takes {idle['ratio']:.3f} of its time while a miner waits; wanted at most {idle['wanted']:.2f}."
    )
    if memory := found.get("memory"):
        parts.append(
            f"A service with {memory['passages']:,} passages took {memory['peak_gib']:.2f} GiB of {memory['planned_gib']:.2f} "
            f"planned, {memory['ratio']:.2f}; wanted {memory['wanted'][0]} to {memory['wanted'][1]}."
        )
    return parts


def _index_parts(indexes: dict[str, dict[str, Any]]) -> list[Part]:
    """Return, for each corpus, an index against exact search, and what it finds by what it looks at."""
    parts: list[Part] = []
    for name, index in indexes.items():
        seconds = index["seconds"]
        sides = {
            "exact search": {"seconds": seconds["exact"], "ratio": 1.0},
            f"ours, {index['factory']}": {"seconds": index["index_s"], "ratio": index["ratio"]},
        }
        parts.append(_sides(f"search, {name}, {_size(index)}", sides))
        wanted = "" if index["wanted"] is None else f"; wanted at most {index['wanted']:.2f}"
        parts.append(
            f"With recall {index['recall']:.3f} at nprobe {index['nprobe']} it takes {index['ratio']:.2f} of exact search: "
            + ", ".join(f"{work} {seconds[work]:.1f} s" for work in ("training", "adding", "searching"))
            + f"{wanted}."
        )
        for what, key in (("one index", "points"), ("one for every block of 65,536", "points_of_blocks")):
            rows = [
                (str(p["nprobe"]), f"{p['share']:.2%}", f"{p['recall']:.3f}", f"{1000 * p['seconds_of_query']:.3g}")
                for p in index[key]
            ]
            if rows:
                columns = ("nprobe", "passages looked at", f"recall@{index['top_k']}", "ms a query")
                parts.append(Sheet(f"{name}: {what}", columns, rows))
    return parts


def _size(found: dict[str, Any]) -> str:
    return f"{found['queries']:,} x {found['passages']:,}, width {found['width']}, k {found['top_k']}"


def _sides(title: str, sides: dict[str, dict[str, float]]) -> Sheet:
    rows = [(side, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}") for side, row in sides.items()]
    return Sheet(title, ("", "seconds", "ratio"), rows)
