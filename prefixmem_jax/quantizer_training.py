"""Fits a quantizer to vectors in a folder, in which a killed fit goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from prefixmem_jax.config import Config
from prefixmem_jax.config_files import from_keys, to_json
from prefixmem_jax.data.item_vectors import ItemVectors
from prefixmem_jax.data.prepare import data_vocabulary
from prefixmem_jax.errors import UserError
from prefixmem_jax.files import reading_npz, write_npz, write_text
from prefixmem_jax.parallel.mesh import make_mesh
from prefixmem_jax.semantic_ids.quantizers.quantizer import Fitted, Fitting, Quantizer
from prefixmem_jax.semantic_ids.vectors import Vectors
from prefixmem_jax.storage import make_folder, remove_folder

if TYPE_CHECKING:
    from prefixmem_jax.runs.run import Run

# What is fitted to what; what a fit saved; the run of what is trained.
ABOUT, STATE, RUN = "about.txt", "state.npz", "run"


def fitted_to(quantizer: Quantizer, vectors: Vectors) -> str:
    """What a fit depends on."""
    return f"{vectors.sha256}\n{to_json(quantizer)}"


def fit_quantizer(quantizer: Quantizer, vectors: Vectors, folder: Path) -> Fitted:
    """Codes fitted to vectors, begun or taken up where an earlier call was killed.

    Args:
      folder: holds what there is of the fit until the caller, who has put what came of it where it
        is safe, removes it. A fit of other keys or vectors there gives way to this one.

    Raises:
      UserError: another process is at it.
    """
    about, noted = fitted_to(quantizer, vectors), folder / ABOUT
    if not noted.is_file() or noted.read_text() != about:
        if (folder / RUN).is_dir() and _run(folder).is_locked:
            raise UserError(f"{folder}: another process fits something else there; wait for it")
        remove_folder(folder)
        make_folder(folder)
        write_text(noted, about)
    saved: Fitted = {}
    if (folder / STATE).is_file():
        with reading_npz(folder / STATE) as arrays:
            saved = dict(arrays)
    fitting = Fitting(
        make_mesh(),
        saved,
        lambda state: write_npz(folder / STATE, state),
        lambda keys: _trained(keys, vectors, folder / RUN),
    )
    try:
        return quantizer.fit(vectors, fitting)
    except UserError:
        run = _run(folder)
        if not ((folder / STATE).is_file() or run.has_checkpoint or run.is_locked):
            remove_folder(folder)  # it was refused: there is nothing to go on from
        raise


def _run(folder: Path) -> Run:
    from prefixmem_jax.runs.run import Run  # only here: what trains is slow to import

    return Run(folder / RUN)


def _trained(keys: dict[str, Any], vectors: Vectors, run: Path) -> dict[str, Any]:
    """Parameters by part, on the host, of what a config's keys train on vectors."""
    from prefixmem_jax.training.loop import train  # only here: it is slow to import

    config = from_keys(keys, Config)
    config.check()
    devices, wanted = make_mesh(config.mesh).devices.size, config.data.batch_size
    # So many, or some more to divide by the devices; no more than there are.
    size = min(wanted + -wanted % devices, max(vectors.count - vectors.count % devices, devices))
    config = replace(config, data=replace(config.data, batch_size=size))
    data = ItemVectors(vectors, data_vocabulary(config.data))
    return jax.device_get(train(config, run, data).used_params)
