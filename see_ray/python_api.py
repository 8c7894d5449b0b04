"""Learning and serving from a script or a notebook: `see_ray.learn` and `see_ray.serve`.

Both connect to Ray as the command `see` does: to the cluster that `$RAY_ADDRESS` names, else to one that runs on this
machine, else to a new one that ends with this process.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from see_ray import cluster
from see_ray.client import Client
from see_ray.config import Config

if TYPE_CHECKING:
    from see_ray.pipeline import Learned
    from see_ray.progress import Listener


def learn(
    source: str | Path,
    config: Config | None = None,
    *,
    name: str | None = None,
    replace: bool = False,
    force: bool = False,
    listener: Listener | None = None,
) -> Learned:
    """Fit one new expert on a task and publish it; an endpoint that serves this store picks it up.

    Args:
        source: a JSONL or parquet file, a folder of them, or the id of a Hugging Face dataset.
        config: all settings; the defaults if None.
        name: of the expert; the source's name if None.
        replace: take the place of a live expert of the same name.
        force: publish even if the expert fails a limit of the gate.
        listener: receives steps, progress and notes; nothing is printed if None.

    Returns:
        What was learned; its `manifest` describes the new expert.

    Raises:
        GateError: the expert failed a limit of the gate and was set aside.
        SeeError: a step failed; the live sequence is unchanged.
    """
    from see_ray import pipeline

    cluster.connect()
    task = pipeline.Source(str(source), name=name)
    return pipeline.learn(task, config or Config(), replace=replace, force=force, listener=listener)


class Endpoint:
    """A running endpoint; a context manager that stops it.

    Attributes:
        url: base URL, `http://host:port`; OpenAI clients take `{url}/v1`.
        client: a client of this endpoint, with its API key.
    """

    def __init__(self, url: str, client: Client):
        self.url, self.client = url, client

    def stop(self) -> None:
        """Stop the endpoint; the Ray cluster keeps running."""
        from see_ray.serving import endpoint

        endpoint.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()


def serve(config: Config | None = None) -> Endpoint:
    """Start the endpoint on Ray; it serves the experts that are live in the store, and new ones as they are published.

    Args:
        config: all settings; the defaults if None.

    Returns:
        The running endpoint, once every live expert answers.

    Raises:
        BaseModelError: the base model cannot be found or read.
        ServingError: an endpoint runs on this cluster already, the port is taken, or something did not start.
    """
    from see_ray.serving import endpoint

    config = config or Config()
    cluster.connect()
    url = endpoint.start(config)
    return Endpoint(url, Client(url, api_key=endpoint.check_exposure(config).first))
