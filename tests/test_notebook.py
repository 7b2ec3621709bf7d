"""The tour is run as a newcomer would run it: top to bottom, in the folder it stands in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[1] / "experiments" / "tour.ipynb"
HEADLINES = (
    *("cosine_affinity", "threshold_route", "bank_forward", "surprise_and_grad", "normalised_surprise"),
    *("output_surprise", "min_k_mask", "predictive_integrity", "token_entropy"),
)


def stored() -> NotebookNode:
    read: Callable[[Path, int], NotebookNode] = nbformat.read
    return read(NOTEBOOK, 4)


@pytest.fixture(scope="module")
def executed() -> NotebookNode:
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook := stored(), timeout=600, kernel_name="python3", resources=resources).execute()
    return notebook


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_it_is_stored_without_outputs_and_small() -> None:
    validate: Callable[[NotebookNode], None] = nbformat.validate
    validate(stored())
    assert outputs(stored()) == []
    assert all(cell.execution_count is None for cell in stored().cells if cell.cell_type == "code")
    assert NOTEBOOK.stat().st_size < 40_000
    assert set(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.parametrize("name", HEADLINES)
def test_every_headline_function_is_explained_before_it_is_used(name: str) -> None:
    kinds = [cell.cell_type for cell in stored().cells if f"F.{name}" in cell.source]
    assert "code" in kinds
    assert kinds[0] == "markdown"


def test_it_runs_from_top_to_bottom_with_pictures_and_without_a_complaint(executed: NotebookNode) -> None:
    kinds = [output.output_type for output in outputs(executed)]
    assert "error" not in kinds
    pictures = [output for output in outputs(executed) if "image/png" in output.get("data", {})]
    assert len(pictures) == sum("plt.subplots" in cell.source for cell in executed.cells) == 7
    assert [output.text for output in outputs(executed) if output.get("name") == "stderr"] == []


def test_what_it_claims_it_shows(executed: NotebookNode) -> None:
    text = "".join(output.text for output in outputs(executed) if output.get("name") == "stdout")
    difference = re.search(r"dense layer and its experts: (\S+)", text)
    surprise = re.search(r"(\S+) from the tap, (\S+) by hand", text)
    loss = re.search(r"loss (\S+) to (\S+) nats", text)
    assert difference
    assert float(difference[1]) < 1e-5
    assert surprise
    assert float(surprise[1]) == pytest.approx(float(surprise[2]), rel=1e-4)
    assert float(surprise[1]) > 0
    assert loss
    assert float(loss[2]) < 0.8 * float(loss[1])
