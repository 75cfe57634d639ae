"""mlx-lm's server on compressed caches: its own classes, with names of its module replaced for the time of the run.

What is added: compressed models, `GET /v1/kvq`, a byte budget over requests in flight and stored prompt caches, a disk
tier, error answers in place of hanging clients, and a generation thread that survives a failing request.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from huggingface_hub.errors import CacheNotFound
from mlx_lm import server

from .cache import flat_caches
from .errors import KVQError
from .hook import LoadHook, compressed_loading
from .isolation import Failure, IsolatingBatchGenerator
from .loading import compression_of
from .prompt_store import PromptStore
from .served_cache import ServedPromptCache
from .serving_http import Handler, HTTPServer
from .serving_report import context_limit, fp16_nbytes, layers_report, model_fact

log = logging.getLogger(__name__)

SPILL_SECONDS = 20.0  # for prompt caches to reach the disk at the end
BUDGET_STEPS = 16  # steps between two looks at the byte budget while no prompts are processed
REPORT_SECONDS = 5.0  # the longest wait for a report; a long prefill step answers with the last one


class RequestError(KVQError, ValueError):
    """A request cannot be served: the client's fault, HTTP status 400."""


class ServerError(KVQError):
    """The server cannot start, or a request failed in it: HTTP status 500."""


class Provider(server.ModelProvider):
    """mlx-lm's, which loads through the hook and tells the prompt caches which model they belong to."""

    def __init__(self, cli_args: Any, hook: LoadHook, store: PromptStore | None = None):
        super().__init__(cli_args)
        self.hook = hook
        self.served = ServedPromptCache(cli_args.prompt_cache_size, cli_args.prompt_cache_bytes, store)

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        self.served.release_model(SPILL_SECONDS)
        self.hook.expect(draft_model_path)
        super()._load(model_path, adapter_path, draft_model_path)
        storable = self.draft_model is None and not self.is_distributed
        if self.served.store is not None and not storable:
            log.warning("kvq: the disk tier is off: it serves neither draft models nor models spread over ranks")
        self.served.attach_model(self.model_key, self.model, storable)
        if self.draft_model is None and not self.is_batchable:
            log.warning("kvq: requests are served one at a time: a layer's cache cannot be batched")


class Generator(server.ResponseGenerator):
    """mlx-lm's, whose thread goes on after an error and answers for what it holds."""

    def __init__(self, provider: Provider, handed: ServedPromptCache | None = None):
        self.served = provider.served
        self.served.live_nbytes = self._live_nbytes
        self.loaded = threading.Event()
        self.load_error: BaseException | None = None
        self.failed_requests = self.crashes = 0
        self._batch: Callable[[], IsolatingBatchGenerator | None] = lambda: None
        self._single: list[Any] | None = None  # caches of the request that is served alone
        self._steps = 0
        self._batch_nbytes = 0  # at the last look
        self._open: weakref.WeakSet[Any] = weakref.WeakSet()  # queues of requests
        self._asked: deque[Future[dict[str, Any]]] = deque()
        self._last_report: dict[str, Any] | None = None
        super().__init__(provider, handed or provider.served)  # starts the thread

    # ---- the thread --------------------------------------------------------------------------------------------

    def _run_generate(self) -> None:
        try:
            self.model_provider.load_default()
        except BaseException as error:  # importing some of mlx-lm's model files exits
            self.load_error = error
            self._generation_failed = True
            return
        finally:
            self.loaded.set()
        try:
            self._generate_on()
        finally:
            self.served.release_model(SPILL_SECONDS)
            self.served.close(SPILL_SECONDS)
            mx.clear_streams()  # MLX aborts the process at its end when a stream outlives its thread

    def _generate_on(self) -> None:
        """mlx-lm's loop, begun again after an error, which all open requests are told."""
        while not self._stop:
            try:
                self._generate()
            except BaseException as error:  # importing some of mlx-lm's model files exits
                log.exception("kvq: the generation loop failed and begins again")
                self.crashes += 1
                if self._is_distributed or not self._open:  # it fails by itself
                    self._generation_failed = True
                    return
                error.__traceback__ = None  # its frames keep caches alive
                gc.collect()
                for queue in list(self._open):
                    queue.put(ServerError(f"the generation loop failed: {type(error).__name__}: {error}"))
                self._open.clear()

    def make_batch(self, model: Any, **options: Any) -> IsolatingBatchGenerator:
        """The batch generator that mlx-lm's loop asks for."""
        made = IsolatingBatchGenerator(
            model,
            after_step=self._after_step,
            may_start=lambda _: self.served.budget is None or self._batch_nbytes < self.served.budget,
            **options,
        )
        self._batch = weakref.ref(made)
        return made

    def serve_single(self, generate: Callable[..., Iterator[Any]], **options: Any) -> Iterator[Any]:
        """mlx-lm's `stream_generate`, whose caches can be seen meanwhile."""
        self._single = options.get("prompt_cache")
        try:
            for response in generate(**options):
                self._answer()
                yield response
        finally:
            self._single = None

    def _after_step(self, batch: IsolatingBatchGenerator) -> None:
        self._steps += 1
        due = self._steps % BUDGET_STEPS == 0 or batch.prompting or batch.waiting
        if self.served.budget is not None and due:
            self._batch_nbytes = batch.prompt_cache_nbytes
            self.served.fit(self._batch_nbytes)
        self._answer()

    def _live_nbytes(self) -> int:
        batch = self._batch()
        return batch.prompt_cache_nbytes if batch is not None else 0

    def _next_request(self, timeout: float | None = None) -> Any:
        self._answer()
        request = super()._next_request(timeout)
        if request is not None:
            self._open.add(request[0])
        return request

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        """As mlx-lm's, plus everything that its loop does with a request before it can be told an error."""
        try:
            found = super()._tokenize(tokenizer, request, args)
            self._make_state_machine(self.model_provider.model_key, tokenizer, args.stop_words)
            server._make_sampler(args, tokenizer)
            server._make_logits_processors(args)
        except Exception as error:
            raise RequestError(f"the request cannot be put to the model: {type(error).__name__}: {error}") from error
        tokens = len(found[0])
        vocabulary = model_fact(self.model_provider.model, "vocab_size")
        unknown = [token for token in args.logits.logit_bias or {} if not 0 <= token < (vocabulary or token + 1)]
        if unknown:  # MLX writes there unchecked
            raise RequestError(f"logit_bias must name tokens of the vocabulary, got {unknown[0]}; leave it out")
        limit = context_limit(self.model_provider.model)
        if tokens == 0:
            raise RequestError("a prompt must have at least one token, got none; send some text")
        if limit is not None and tokens >= limit:
            raise RequestError(
                f"a prompt must be shorter than the model's context of {limit} tokens, got {tokens} tokens; shorten it"
            )
        if limit is not None:
            args.max_tokens = min(args.max_tokens, limit - tokens)
        return found

    def generate(self, request: Any, generation_args: Any, progress_callback: Any = None) -> tuple[Any, Iterator[Any]]:
        """As mlx-lm's; the failure of a request is raised by the iterator."""
        context, responses = super().generate(request, generation_args, progress_callback)
        return context, self._checked(responses)

    def _checked(self, responses: Iterator[Any]) -> Iterator[Any]:
        for response in responses:
            if isinstance(response.finish_reason, Failure):
                self.failed_requests += 1
                error = response.finish_reason.error
                raise ServerError(f"the model failed on this request: {type(error).__name__}: {error}")
            yield response

    # ---- report ------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """What the server holds, for `GET /v1/kvq`: made by the generation thread between two steps.

        Returns the last report, marked as stale, when no step ends within `REPORT_SECONDS`.
        """
        asked: Future[dict[str, Any]] = Future()
        self._asked.append(asked)
        try:
            if not self.generation_available():
                raise TimeoutError
            return asked.result(timeout=REPORT_SECONDS)
        except TimeoutError:
            asked.cancel()
            if self._last_report is None:
                raise ServerError("a report must come from the generation thread, got no answer; ask again") from None
            return {**self._last_report, "stale": True}

    def _answer(self) -> None:
        """Fulfil the reports that were asked for."""
        while self._asked:
            asked = self._asked.popleft()
            if not asked.set_running_or_notify_cancel():
                continue
            try:
                self._last_report = self._report()
                asked.set_result(self._last_report)
            except Exception as error:
                log.exception("kvq: the report failed")
                asked.set_exception(ServerError(f"the report failed: {type(error).__name__}: {error}"))

    def _report(self) -> dict[str, Any]:
        provider = self.model_provider
        maker = compression_of(provider.model) if provider.model is not None else None
        batch = self._batch()
        live = batch.live_caches() if batch is not None else []
        caches = [cache for layers in [*live, self._single or []] for cache in flat_caches(layers)]
        rows = [*batch._prompt_batch.tokens, *batch._generation_batch.tokens] if batch is not None else []
        store = self.served.store
        return {
            "version": version("mlx-kvq-plugin"),
            "mlx_lm": version("mlx-lm"),
            "model": provider.model_key[0] if provider.model_key else None,
            "draft_model": provider.model_key[2] if provider.model_key else None,
            "scheme": maker.scheme if maker else None,
            "adapter": maker.adapter.name if maker else None,
            "layers": layers_report(maker) if maker else None,
            "context_tokens": context_limit(provider.model),
            "batching": provider.is_batchable,
            "live": {
                "sequences": (batch.running if batch is not None else 0) + (self._single is not None),
                "waiting": batch.waiting if batch is not None else 0,
                "tokens": sum(len(row) for row in rows),
                "nbytes": sum(cache.nbytes for cache in caches),
                "fp16_nbytes": sum(fp16_nbytes(cache) for cache in caches),
                "classes": dict(Counter(type(cache).__name__ for cache in caches)),
            },
            "lru": self.served.report(),
            "disk": store.report() | {"waiting_nbytes": self.served.waiting_nbytes} if store is not None else None,
            "requests": {
                "failed": self.failed_requests,
                "recoveries": batch.recoveries if batch is not None else 0,
                "crashes": self.crashes,
            },
            "memory": {"active": mx.get_active_memory(), "peak": mx.get_peak_memory(), "cache": mx.get_cache_memory()},
            "stale": False,
        }


@contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """Other values for names of a module, for the time of the context."""
    before = {name: getattr(module, name) for name in names}
    try:
        for name, value in names.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _stop_on_signals() -> None:
    """SIGTERM and SIGINT end the server in order; a second one ends it at once, which harms no file."""
    stopping: list[int] = []

    def stop(number: int, _: Any) -> None:
        if stopping:
            os._exit(128 + number)
        stopping.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)


def _run(host: str, port: int, provider: Provider, server_class: type[ThreadingHTTPServer]) -> None:
    """In place of mlx-lm's `run`: load, then answer requests until a signal."""
    rank = mx.distributed.init().rank()
    generator = Generator(provider)
    single = server.stream_generate

    def stream_generate(**options: Any) -> Iterator[Any]:
        return generator.serve_single(single, **options)

    with replaced(server, BatchGenerator=generator.make_batch, stream_generate=stream_generate):
        try:
            _stop_on_signals()
            generator.loaded.wait()
            if generator.load_error is not None:
                error = generator.load_error
                raise (
                    error
                    if isinstance(error, KVQError)
                    else ServerError(
                        f"the model must load, got {type(error).__name__}: {error}; check the name and the files"
                    )
                ) from error
            if rank == 0:
                server._run_http_server(host, port, generator, server_class, Handler)
            else:
                generator.join()
        except KeyboardInterrupt:
            pass  # before the HTTP server ran, which otherwise stops here by itself
        finally:
            start = time.monotonic()
            generator.stop_and_join()
            log.info("kvq: stopped after %.1f s", time.monotonic() - start)


def _scan_cache(scan: Callable[[], Any]) -> Callable[[], Any]:
    """The models that Hugging Face's cache holds: none, not an error, when there is no cache."""

    def scanned() -> Any:
        try:
            return scan()
        except CacheNotFound:
            return SimpleNamespace(repos=())

    return scanned


def serve(
    argv: list[str],
    hook: LoadHook,
    store: PromptStore | None = None,
    server_class: type[ThreadingHTTPServer] = HTTPServer,
) -> None:
    """Run mlx-lm's server until SIGTERM, SIGINT or `shutdown()` of the HTTP server.

    Args:
        argv: options of `mlx_lm.server`.
        hook: how models are compressed.
        store: the disk tier.
        server_class: of the HTTP server.

    Raises:
        ServerError: when the model of `--model` cannot be loaded; other errors of `compress` as they are.
    """

    def run(host: str, port: int, provider: Provider) -> None:
        _run(host, port, provider, server_class)

    def provider(arguments: Any) -> Provider:
        return Provider(arguments, hook, store)

    before, sys.argv = sys.argv, ["mlx_lm.server", *argv]
    try:
        with (
            compressed_loading(hook),
            replaced(server, ModelProvider=provider, run=run, scan_cache_dir=_scan_cache(server.scan_cache_dir)),
        ):
            server.main()
    finally:
        sys.argv = before
