"""The code of a registered model: MLflow copies this file into the model and runs it on loading; nothing is pickled.

Prompts come in a table and answers go out in one. What answers is `Predictor`, as in `treelora predict`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from treelora.errors import DataError, TreeLoRAError
from treelora_platform.predict import PredictOptions, open_predictor
from treelora_platform.predict_io import Prompt, checked_prompt
from treelora_platform.quiet import quiet
from treelora_platform.serving import Predictor
from treelora_platform.serving_images import ImagePredictor

RUN = "run"
"""The model's artifact that holds the packed run."""
OPTIONS = ("inference", "task", "router_margin", "max_new_tokens")
COLUMNS = ("answer", "task", "margin", "runner_up", "fallback")


class RunModel(PythonModel):
    """What a run has learnt, behind MLflow's interface; one request is answered at a time."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base model and all adapters. `model_config` may have a `base_model`: a folder or an id.

        Raises:
            TreeLoRAError: the packed run is damaged, or the base model isn't found.
        """
        self._run_dir = Path(context.artifacts[RUN])
        self._base = (context.model_config or {}).get("base_model")
        self._lock = threading.Lock()
        self._options = PredictOptions(base_model=self._base)
        with quiet():
            self._predictor = open_predictor(self._run_dir, self._options)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Answer prompts, or name the classes of images.

        Args:
            context: Not used: `load_context` has read it.
            model_input: Columns `prompt` and, where wanted, `choices` (a list a row; none: as the task does; an empty
                one: free text); for a run on images the column `image`: encoded, as PNG or JPEG say.
            params: `inference`, `task`, `router_margin`, `max_new_tokens`; None: as the run is configured.

        Returns:
            Columns `COLUMNS` (see `predict_io.Answer`) with the input's index.

        Raises:
            MlflowException: a prompt, a choice or a parameter is wrong; servers answer with status 400.
        """
        given = {name: value for name, value in (params or {}).items() if name in OPTIONS and value is not None}
        options = PredictOptions(base_model=self._base, **given)
        try:
            with self._lock:
                predictor = self._with(options)
                prompts = list(_prompts(model_input, isinstance(predictor, ImagePredictor)))
                found = [answer for part in predictor.answers(prompts) for answer in part]
        except TreeLoRAError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        columns = {name: [getattr(answer, name) for answer in found] for name in COLUMNS}
        # objects, because NaN in the place of None would be no JSON
        return pd.DataFrame(columns, index=model_input.index, dtype=object).astype({"fallback": bool})

    def _with(self, options: PredictOptions) -> Predictor:
        if options != self._options:
            self._predictor = open_predictor(self._run_dir, options, reuse=self._predictor)
            self._options = options
        return self._predictor


def _prompts(table: pd.DataFrame, images: bool) -> Iterator[Prompt]:
    wanted = "image" if images else "prompt"
    if wanted not in table.columns:
        raise DataError(f"there is no column {wanted!r}; found {', '.join(map(str, table.columns))}")
    if images:  # never a path: a server would open any file for anybody
        for number, data in enumerate(table["image"].tolist()):
            if not isinstance(data, bytes):
                raise DataError(f"row {number}: `image` is {type(data).__name__}; give the bytes of an encoded image")
            yield Prompt(f"row {number}", number, "", image=data)
        return
    choices = table["choices"].tolist() if "choices" in table.columns else [None] * len(table)
    for number, (text, own) in enumerate(zip(table["prompt"].tolist(), choices, strict=True)):
        yield checked_prompt(f"row {number}", number, text, _plain(own))


def _plain(choices: Any) -> Any:
    """A cell of a table as JSON would have it."""
    if isinstance(choices, list | tuple | np.ndarray):
        return [*choices]
    return None if pd.isna(choices) else choices


set_model(RunModel())
