"""`treelora demo`: the main job twice, with TreeLoRA and with plain sequential LoRA, side by side."""

from __future__ import annotations

from rich.console import Console

from treelora_platform.config import load_config
from treelora_platform.recipes import recipe_path
from treelora_platform.report import write_report
from treelora_platform.run import run_experiment
from treelora_platform.show import show_arms, show_matrices, show_tree
from treelora_platform.summary import render_comparison, summarise
from treelora_platform.tracking import resolve_tracking_uri


def run_demo(output_dir: str, overrides: list[str], fresh: bool, console: Console) -> None:
    """Run both, show both, say where to look next."""
    folders = []
    for method in ("treelora", "sequential"):
        fixed = [f"method={method}", f"name=demo-{method}", f"output_dir={output_dir}"]
        config = load_config(recipe_path("demo"), [*overrides, *fixed])
        console.rule(
            f"{method}: {config.model.name}, {config.cluster.workers} workers, ZeRO-{config.engine.zero_stage}"
        )
        folders.append(run_experiment(config, console, fresh=fresh).run_dir)
    ours, plain = folders
    console.rule("what was kept")
    for folder in folders:
        console.print(f"[bold]{folder.name}[/]")
        show_matrices(folder, console)
    show_tree(ours, console)
    show_arms(ours, console)
    console.print(render_comparison([summarise(folder) for folder in folders]))
    report = write_report(ours, out=ours.parent / "demo-report.html", other=plain)
    uri = resolve_tracking_uri(config.tracking.uri, ours.parent)
    console.print(
        f"report:  {report}\nMLflow:  mlflow ui --backend-store-uri {uri}\nmore:    treelora show {ours}",
        highlight=False,
    )
