"""The model card of a run: metadata that the Hub reads, and what it cost in words and figures. Touches no network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..data.task import TASKS
from .figures import comparison
from .page import TEMPLATES, fill_template
from .text import (
    accuracy_cost,
    describe_schedule,
    how_it_ended,
    how_it_trained,
    metric,
    points,
    runs_words,
    spread_words,
    time_cost,
    when_not_to_use,
)

__all__ = ["card_arguments", "render_card"]

#: Metrics by the names that the Hub knows.
_HUB_METRICS = {"accuracy", "f1", "precision", "recall", "roc_auc", "matthews_correlation", "mse", "mae"}
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TAGS = ("hf_freezecache", "generated_from_trainer")

Figures = Mapping[str, Any]


def _listed(value: Any) -> list[str]:
    values = [value] if isinstance(value, str) else list(value or [])
    return [item for item in dict.fromkeys(map(str, values)) if item]


def card_arguments(
    *,
    model_name: str,
    model_id: str | None = None,
    language: Any = None,
    license: str | None = None,
    tags: Any = None,
    finetuned_from: str | None = None,
    tasks: Any = None,
    dataset_tags: Any = None,
    dataset: Any = None,
    dataset_args: Any = None,
) -> dict[str, Any]:
    """Return the arguments of a card in one form, as the record of a run keeps them. Nothing is guessed.

    Args:
        model_name: Title of the card.
        model_id: Repository on the Hub, if there is one.
        language: As in ``Trainer.create_model_card``, like all that follow.
        license: Named in the card only if given.
        tags: Added to our own.
        finetuned_from: A model on the Hub.
        tasks: Tasks by the Hub's names.
        dataset_tags: Data sets on the Hub.
        dataset: Names of the data sets, in the order of ``dataset_tags``.
        dataset_args: Their configurations.
    """
    return {
        "model_name": model_name,
        "model_id": model_id,
        "language": _listed(language),
        "license": license,
        "tags": _listed([*_listed(tags), *_TAGS]),
        "finetuned_from": finetuned_from if finetuned_from and _REPO_ID.fullmatch(finetuned_from) else None,
        "tasks": _listed(tasks),
        "dataset_tags": [tag for tag in _listed(dataset_tags) if _REPO_ID.fullmatch(tag)],
        "dataset": _listed(dataset) or _listed(dataset_tags),
        "dataset_args": _listed(dataset_args),
    }


def _metadata(figures: Figures, card: Mapping[str, Any]) -> ModelCardData:
    """Return the metadata; results only where task, data set and metric are known by name."""
    result, tasks, names = figures["result"] or {}, card["tasks"], card["dataset"]
    metrics = {name: value for name, value in result.get("metrics", {}).items() if name in _HUB_METRICS}
    results = []
    measured = [(name, value, "") for name, value in metrics.items()]
    # The model's own score comes first: it is what a reader of the metadata gets who takes one.
    if spread := figures["seeds"]:
        for name in filter(spread["metrics"].__contains__, metrics):
            found = spread["metrics"][name]
            words = f" (mean over {runs_words(spread)}; standard deviation {found['standard_deviation']:.4f})"
            measured.append((name, found["mean"], words))
    if len(tasks) == 1 and len(names) == 1:
        results = [
            EvalResult(
                task_type=tasks[0],
                task_name=TASKS[tasks[0]].title if tasks[0] in TASKS else None,
                dataset_type=card["dataset_tags"][0] if card["dataset_tags"] else re.sub(r"[^\w.-]+", "-", names[0]),
                dataset_name=names[0],
                dataset_config=card["dataset_args"][0] if card["dataset_args"] else None,
                metric_type=name,
                metric_name=name.replace("_", " ").capitalize() + words,
                metric_value=round(float(value), 6),
            )
            for name, value, words in measured
        ]
    return ModelCardData(
        library_name="transformers",
        language=card["language"] or None,
        license=card["license"],
        base_model=card["finetuned_from"],
        pipeline_tag=tasks[0] if len(tasks) == 1 else None,
        datasets=card["dataset_tags"] or None,
        metrics=list(metrics) or None,
        tags=card["tags"],
        model_name=card["model_name"] if results else None,
        eval_results=results or None,
    )


def render_card(figures: Figures, card: Mapping[str, Any], plot: str | None = None) -> str:
    """Return the text of README.md.

    Args:
        figures: As ``report.figures_of`` returns them.
        card: As ``card_arguments`` returns them.
        plot: Path of the picture, from the card; ``None`` shows none.
    """
    body = fill_template(
        TEMPLATES / "model_card.md",
        figures=figures,
        card=card,
        plot=plot,
        schedule=describe_schedule(figures),
        ending=how_it_ended(figures),
        training_source=how_it_trained(figures),
        accuracy_cost=accuracy_cost(figures),
        time_cost=time_cost(figures),
        when_not_to_use=when_not_to_use(figures),
        compared=comparison(figures),
        metric=metric,
        points=points,
        runs_words=runs_words,
        spread_words=spread_words,
    )
    return str(ModelCard(f"---\n{_metadata(figures, card).to_yaml()}\n---\n\n{body}"))
