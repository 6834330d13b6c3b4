"""Figure 5 of the paper on a datastore of one's own: speed-up of speculation over sequential KNN-LM, by k and stride.

For each k: RaLMSeq, fixed strides 1, 2, 4, 8, the scheduler OS3, each also with asynchronous verification,
continuous speculation, and what chooses by itself, on the same prompts, paired and interleaved (see `ralmspec knn
compare`). The interpolation and temperature of each k come from `ralmspec knn tune --json`. With a latency the
retriever is simulated to have resources of its own; that is set as a multiple of a, the time of one token without its
search, measured first.
"""

import gzip
import json
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console

from ralmspec.pipeline import Sampling
from ralmspec.pipeline.compare import Runs, report, run
from ralmspec.pipeline.engine import Engine, delayed
from ralmspec.pipeline.held_out import held_out_prompts
from ralmspec.pipeline.knn_engine import KnnOptions, open_knn_engine
from ralmspec.pipeline.line_up import by_stride
from ralmspec.pipeline.overlap import overlap_efficiency
from ralmspec.pipeline.reports import Comparison
from ralmspec.pipeline.tables import comparison_table
from ralmspec.retrievers.datastore_build import DatastoreOptions, build_datastore
from ralmspec.retrievers.vectors import Memory
from ralmspec.stages.knn_lm import KnnLM
from ralmspec.stages.transformers_model import TransformersModel

DEMO = Path(__file__).parent.parent / "examples" / "demo"
QUICK = ("RaLMSeq", "s=4", "OS3", "OS3 +A", "continuous")


def bundled(work: Path, entries: int) -> tuple[Path, Path]:
    """A datastore of bundled passages, and a text of others."""
    with gzip.open(DEMO / "passages_wikipedia.jsonl.gz", "rt") as lines:
        passages = [json.loads(line)["text"] for line in lines]
    known, held_out = work / "known.txt", work / "held_out.txt"
    known.write_text("\n".join(passages[:400]))
    held_out.write_text("\n".join(passages[-100:]))
    model = TransformersModel.load(DEMO / "model")
    options = DatastoreOptions(kinds=("exact", "hnsw", "ivf"), max_entries=entries)
    build_datastore([known], work / "store", model, options)
    return work / "store", held_out


def measure(
    engine: Engine, prompts: list[str], tokens: int, only: list[str], prefetch: int, flights: int
) -> Comparison:
    """One k."""
    arrangements = {n: a for n, a in by_stride(prefetch, flights).items() if n == "RaLMSeq" or not only or n in only}
    runs = Runs(arrangements)
    anyio.run(
        lambda: run(engine, prompts, runs, max_new_tokens=tokens, sampling=Sampling()),
        backend_options={"use_uvloop": True},
    )
    overlap = overlap_efficiency(engine)
    return report(runs, engine, max_new_tokens=tokens, overlap=overlap, prefetch=prefetch, flights=flights)


def with_settings(engine: Engine, k: int, interpolation: float, temperature: float, latency: float) -> Engine:
    """The same model and datastore under other settings, behind a set latency if there is one."""
    assert isinstance(engine.options, KnnOptions) and isinstance(engine.workload, KnnLM)
    settings: dict[str, Any] = {"top_k": k, "interpolation": interpolation, "temperature": temperature}
    options = replace(engine.options, **settings, retriever_latency=latency)
    return replace(
        engine,
        options=options,
        workload=replace(engine.workload, **settings),
        retriever=delayed(engine.index, options),
    )


def token_seconds(engine: Engine, prompts: list[str]) -> float:
    """a: one token of RaLMSeq without its search."""
    made = measure(engine, prompts[:2], 24, ["RaLMSeq"], 1, 1)
    return float(made.environment["a_s"])


def markdown(made: dict[int, Comparison]) -> list[str]:
    """One line a k, one column an arrangement: speed-up, and γ in brackets."""
    names = [row.arrangement for row in next(iter(made.values())).rows]
    lines = ["| k | λ | T | b/a | " + " | ".join(names) + " | identical |", "|" + "---|" * (len(names) + 5)]
    for k, table in made.items():
        facts = table.environment
        cells = [f"{r.speedup:.2f}" + (f" ({r.gamma:.2f})" if r.gamma is not None else "") for r in table.rows]
        same, all_of_them = sum(r.identical for r in table.rows), sum(r.outputs for r in table.rows)
        lines.append(
            f"| {k} | {facts['interpolation']:.3f} | {facts['temperature']:.1f} | {facts['b_over_a']:.1f} | "
            + " | ".join(cells)
            + f" | {same}/{all_of_them} |"
        )
    best = max((row.speedup, k, row.arrangement, row.f_ideal) for k, table in made.items() for row in table.rows)
    return [*lines, "", f"Best: {best[0]:.2f}× at k = {best[1]} ({best[2]}, F_ideal {best[3]:.2f})."]


def plot(made: dict[int, Comparison], path: Path, title: str) -> None:
    """Speed-up over k, a line an arrangement."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in [row.arrangement for row in next(iter(made.values())).rows][1:]:
        speeds = [next(row.speedup for row in table.rows if row.arrangement == name) for table in made.values()]
        style = "--" if "+A" in name else "-"
        axes.plot([*made], speeds, style, marker="o", markersize=3, label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="k, neighbours of a token", ylabel="speed-up over sequential KNN-LM", title=title)
    axes.set_xticks([*made], labels=[str(k) for k in made])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path)


def main(
    datastore: Annotated[
        Path | None,
        typer.Option(help="Made by `ralmspec knn build`; a small one of the bundled text if none is given."),
    ] = None,
    model: Annotated[str, typer.Option(help="The model that made it.")] = str(DEMO / "model"),
    text: Annotated[
        Path | None, typer.Option(help="Held-out text, of which prompts are stretches; bundled if none is given.")
    ] = None,
    entries: Annotated[int, typer.Option(min=1000, help="Entries of the bundled datastore.")] = 20_000,
    settings: Annotated[Path | None, typer.Option(help="What `ralmspec knn tune --json` has written.")] = None,
    retriever: Annotated[str, typer.Option(help="exact, hnsw or ivf.")] = "exact",
    drafter: Annotated[str, typer.Option(help="Another kind, which guesses beside the cache in 'continuous'.")] = "",
    memory: Annotated[Memory, typer.Option(help="map, copy or float32; see `ralmspec knn compare`.")] = "copy",
    ratio: Annotated[float, typer.Option(help="b/a of the simulated retriever; 0: the index as it is here.")] = 20.0,
    concurrency: Annotated[int, typer.Option(help="Searches that the simulated retriever serves at once.")] = 1,
    flights: Annotated[int, typer.Option(help="Batches in flight at once in 'continuous'.")] = 1,
    ks: Annotated[str, typer.Option("--k", help="Numbers of neighbours, with commas.")] = "1,8,64,256,1024",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of 64 tokens.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    prefetch: Annotated[int, typer.Option(min=1, help="Neighbours that a search brings into the cache.")] = 256,
    only: Annotated[str, typer.Option(help="Arrangements, with commas; all if none.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help=f"Only {', '.join(QUICK)}.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write OUT.md, OUT.json and OUT.svg.")] = None,
) -> None:
    """Measure, print, and write what was measured so far after every k."""
    console = Console(width=150)
    counts = [int(k) for k in ks.split(",")]
    chosen = [*QUICK] if quick else [name.strip() for name in only.split(",") if name.strip()]
    tuned = {}
    if settings is not None:
        tuned = {
            m["top_k"]: (m["interpolation"], m["temperature"]) for m in json.loads(settings.read_text())["mixtures"]
        }
    with ExitStack() as stack:
        if datastore is None or text is None:
            work = stack.enter_context(tempfile.TemporaryDirectory())
            datastore, text = bundled(Path(work), entries)
        options = KnnOptions(
            model=model,
            datastore=datastore,
            retriever=retriever,
            drafter=drafter,
            memory=memory,
            retriever_concurrency=concurrency,
        )
        engine = open_knn_engine(options, documents=max(*counts, prefetch), max_prompt_tokens=64)
        stretches = held_out_prompts(engine.model, text, count=prompts, tokens=64)
        made: dict[int, Comparison] = {}
        for k in counts:
            share, temperature = tuned.get(k, (options.interpolation, options.temperature))
            bare = with_settings(engine, k, share, temperature, 0.0)
            latency = ratio * token_seconds(bare, stretches) if ratio else 0.0
            made[k] = measure(
                with_settings(engine, k, share, temperature, latency),
                stretches,
                max_new_tokens,
                chosen,
                prefetch,
                flights,
            )
            console.print(comparison_table(made[k]))
            if out is not None:
                facts = made[k].environment
                simulated = (
                    f"simulated latency, {concurrency} at once" if ratio else "index and model on the same cores"
                )
                head = [
                    f"{facts['retriever']}; {simulated}. {prompts} prompts of 64 tokens, {max_new_tokens} tokens each.",
                    f"Speed-up over RaLMSeq, γ in brackets. {facts['date']}, {facts['machine']}, "
                    f"load average {facts['load_average']}.",
                    "",
                ]
                out.with_suffix(".md").write_text("\n".join([*head, *markdown(made)]) + "\n")
                tables = {k: table.model_dump(mode="json") for k, table in made.items()}
                out.with_suffix(".json").write_text(json.dumps(tables, indent=1) + "\n")
                plot(made, out.with_suffix(".svg"), f"{retriever}, {simulated}")


if __name__ == "__main__":
    typer.run(main)
