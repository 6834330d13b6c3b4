"""The command line: `ralmspec ask`, `compare`, `verify-lossless` and `stress` for in-context RaLM; `index build` and
`info`; `knn build`, `info`, `tune`, `perplexity`, `ask`, `compare`, `verify-lossless`; `bench retrieval` and
`locality`; `doctor`."""

import typer

from . import command_bench, command_index, command_knn, command_knn_perplexity, command_knn_serve
from .command_ask import ask
from .command_compare import compare_command
from .command_doctor import doctor
from .command_stress import stress_command
from .command_verify import verify_command

app = typer.Typer(
    help="Iterative retrieval-augmented generation, served with speculation: same output, lower latency.\n\n"
    "ask, compare, verify-lossless and stress need a model (a folder or a hub id) and an index folder, or a data "
    "folder that holds passages_NAME.jsonl[.gz], embeddings_NAME_*.npy and, for measuring, questions_SET.jsonl[.gz]. "
    "The knn commands need a model and a datastore of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("ask")(ask)
app.command("compare")(compare_command)
app.command("verify-lossless")(verify_command)
app.command("stress")(stress_command)
app.add_typer(command_index.app, name="index")
for name, command in (
    ("ask", command_knn_serve.ask_command),
    ("compare", command_knn_serve.compare_command),
    ("verify-lossless", command_knn_serve.verify_command),
    ("tune", command_knn_perplexity.tune_command),
    ("perplexity", command_knn_perplexity.perplexity_command),
):
    command_knn.app.command(name)(command)
app.add_typer(command_knn.app, name="knn")
app.add_typer(command_bench.app, name="bench")
app.command("doctor")(doctor)
