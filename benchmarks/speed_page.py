"""docs/performance.md from the figures of `speed.py`.

python benchmarks/speed_page.py    writes the page anew from docs/performance.json
"""

import statistics

from pages import fill, read_figures, table, write_page

JOBS = {
    "decoder": "Kandinsky 2.2 decoder, full",
    "prior": "Kandinsky 2.2 prior, full",
    "sdxl": "SDXL, full",
    "lcm_lora": "LCM LoRA (Stable Diffusion)",
}
STEP_PATCHES = ("no_subnormals", "no_views", "no_same_casts", "onednn_convolutions", "conv_bias", "linear_bias")
SIZES = ("0.5", "1", "2")
MISSING = "Not measured yet"


def page(figures: dict) -> str:
    """The page, from {processor: {job: {size: figures}}}: a table for each processor; it lists what is missing."""
    parts = {}
    for make_table in (jobs, patches, profile, start):
        tables = [f"**{processor}**\n\n{found}" for processor, own in figures.items() if (found := make_table(own))]
        parts[make_table.__name__] = "\n\n".join(tables) or MISSING
    return fill("speed_page.md", parts)


def jobs(figures: dict) -> str:
    header = ["job, size", "torch", "cached", "online", "Paddle as it comes", "cached : torch", "online : torch"]
    header += ["cached : as it comes", "filling the cache", "steps until it pays off"]
    rows, missing = [], []
    for job, title in JOBS.items():
        for size in SIZES:
            found, name = figures.get(job, {}).get(size), f"{title}, ×{size}"
            if found:
                rows.append([name, *job_row(found)])
            else:
                missing.append(name)
    return table(header, rows) + (f"\n\n{MISSING}: {'; '.join(missing)}" if rows and missing else "")


def job_row(found: dict) -> list:
    sides, cache = found["sides"], found["cache"]
    cells = [
        f"{statistics.median(sides[side]['seconds']):.2f} s, {sides[side]['peak_mb'] / 1000:.2f} GB"
        for side in ("torch", "cached", "online", "as it comes")
    ]
    cells += [
        ratio(sides["torch"], sides["cached"]),
        ratio(sides["torch"], sides["online"]),
        ratio(sides["as it comes"], sides["cached"]),
    ]
    saved = statistics.median(sides["torch"]["seconds"]) - statistics.median(sides["cached"]["seconds"])
    pays = f"{cache['seconds'] / saved:.0f}" if saved > 0 else "–"
    filling = f"{cache['seconds'] / cache['samples']:.2f} s per sample"
    return [*cells, filling, f"{pays} (for {cache['samples']} samples)"]


def ratio(one: dict, other: dict) -> str:
    """The time of one side in times of the other's: the median of the turns with the smallest and the largest."""
    found = [a / b for a, b in zip(one["seconds"], other["seconds"])]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def patches(figures: dict) -> str:
    rows = []
    for job, title in JOBS.items():
        found = figures.get(job, {}).get("1", {}).get("patches")
        if not found:
            continue
        cells = [ratio(found[name], found["none"]) for name in (*STEP_PATCHES, ",".join(STEP_PATCHES))]
        compiled = ratio(found["online, compiled encoders"], found["online, plain encoders"])
        rows.append([title, *cells, compiled])
    return table(["time of a step, ×1", *STEP_PATCHES, "all of these", "compiled encoders, online"], rows)


def profile(figures: dict) -> str:
    rows = []
    for job, title in JOBS.items():
        found = figures.get(job, {}).get("1", {}).get("profile")
        if not found:
            continue
        before, after = found["none"], found["patches"]
        largest = sorted({**after, **before}, key=lambda kernel: -max(before.get(kernel, 0), after.get(kernel, 0)))[:8]
        for number, kernel in enumerate(largest):
            times = [f"{which.get(kernel, 0.0):.0f}" for which in (before, after)]
            rows.append(["" if number else title, kernel, *times])
    return table(["job, ×1", "kernel", "before, ms per step", "after, ms per step"], rows)


def start(figures: dict) -> str:
    found = figures.get("decoder", {}).get("1", {}).get("start")
    rows = [[name, f"{seconds:.2f} s"] for name, seconds in found.items()] if found else []
    return table(["decoder, ×1", "in a process of its own"], rows)


if __name__ == "__main__":
    write_page("performance", page(read_figures("performance")))
