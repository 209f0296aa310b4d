"""Token ids of the texts that are encoded together: read once, uploaded once, and made into chunks' inputs on the device.

The lengths of all texts stay on the host, so the shape of every input is known there: nothing is asked of the device, and
the host runs ahead of it. The ids wait in pinned memory where the device is a GPU, so that their upload keeps nobody waiting.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.encoder.tokens import TokenTable

# n rows of the step, m rows of a chunk, T tokens of a chunk, L tokens of its longest row


class StepTokens:
    """The token ids of n rows; `load` makes the inputs of some of them."""

    def __init__(self, sides: Sequence[tuple[TokenTable, np.ndarray]], device: torch.device, is_packed: bool = False):
        """Read the rows' tokens, those of equal texts once.

        sides: tables of one tokenizer and rows of each, (k,) int64; the rows of all are counted through.
        is_packed: inputs are packed: their rows stand one behind the other, without padding.
        """
        if not any(len(rows) for _, rows in sides):  # a rank without rows still takes part in forwards
            sides = [(sides[-1][0], np.zeros(1, np.int64))]
        self._device, self._is_packed, self._pad_id = device, is_packed, sides[0][0].pad_id
        first_u, place_n = _distinct(np.concatenate([table.keys(rows) for table, rows in sides]))
        self._length_n = np.concatenate([table.lengths[rows] for table, rows in sides])
        length_u = self._length_n[first_u]
        self._start_n = (np.cumsum(length_u) - length_u)[place_n]  # of each row's tokens among all
        self._prompt_n = np.concatenate([table.prompts(rows) for table, rows in sides])
        self._has_prompts = any(table.prompt_tokens is not None for table, _ in sides)
        edges = np.searchsorted(first_u, np.cumsum([0, *(len(rows) for _, rows in sides)]))
        first_rows = np.concatenate([rows for _, rows in sides])[first_u]
        ids = [table.read(rows) for (table, _), rows in zip(sides, np.split(first_rows, edges[1:-1]), strict=True)]
        self._waiting_ids = self._pinned(np.concatenate(ids))

    def load(self, rows: Tensor) -> dict[str, Any]:
        """Return the inputs of some rows, on the device; of none: any input.

        rows: (m,) int64 on the CPU.
        Packed: `input_ids` (T,), `starts` (m + 1,) int32 of the rows and behind the last, `longest` int.
        Otherwise `input_ids` and, where the rows are of several lengths, `attention_mask`, (m, L) int64, padded on the right.
        And `pooled_mask`, like `input_ids`, if prompts are left out of the pooling.
        """
        row_m = rows.numpy() if len(rows) else np.zeros(1, np.int64)
        return self._packed(row_m) if self._is_packed else self._padded(row_m)

    def _packed(self, row_m: np.ndarray) -> dict[str, Any]:
        length_m = self._length_n[row_m]
        end_m = np.cumsum(length_m)
        total, first_m = int(end_m[-1]), end_m - length_m
        # One small upload: of each row its tokens, their way from the chunk to the buffer, its first and its first pooled token.
        numbers = np.zeros((4, len(row_m) + 1), np.int64)
        numbers[:3, :-1] = length_m, self._start_n[row_m] - first_m, first_m + self._prompt_n[row_m]
        numbers[3, 1:] = end_m
        length, way, pooled, start = self._pinned(numbers).to(self._device, non_blocking=True)
        place_T = torch.arange(total, device=self._device)
        inputs = {
            "input_ids": self._ids[place_T + way.repeat_interleave(length, output_size=total)],
            "starts": start.int(),
            "longest": int(length_m.max()),
        }
        if self._has_prompts:
            inputs["pooled_mask"] = (place_T >= pooled.repeat_interleave(length, output_size=total)).long()
        return inputs

    def _padded(self, row_m: np.ndarray) -> dict[str, Tensor]:
        length_m = self._length_n[row_m]
        numbers = np.stack([self._start_n[row_m], length_m, self._prompt_n[row_m]])
        start_m1, length_m1, prompt_m1 = self._pinned(numbers).to(self._device, non_blocking=True).unsqueeze(-1)
        place_L = torch.arange(int(length_m.max()), device=self._device)
        place_mL = start_m1 + place_L
        if length_m.min() == length_m.max():
            inputs = {"input_ids": self._ids[place_mL]}
        else:
            is_token_mL = place_L < length_m1
            ids_mL = self._ids[place_mL.clamp_(max=len(self._ids) - 1)]
            inputs = {"input_ids": ids_mL.where(is_token_mL, self._pad_id), "attention_mask": is_token_mL.long()}
        if self._has_prompts:
            is_pooled_mL = (place_L >= prompt_m1).long()
            inputs["pooled_mask"] = is_pooled_mL * inputs.get("attention_mask", 1)
        return inputs

    def _pinned(self, values: np.ndarray) -> Tensor:
        found = torch.from_numpy(values)
        return found.pin_memory() if self._device.type == "cuda" else found

    @functools.cached_property
    def _ids(self) -> Tensor:
        return self._waiting_ids.to(self._device, non_blocking=True).long()


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (the first row of each distinct key, ascending; for every row its place among them)."""
    _, first_u, place_n = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first_u)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first_u[order], rank[place_n]
