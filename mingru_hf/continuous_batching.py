"""Continuous batching: requests of any length join the batch as others leave it, as in generate_batch().

transformers builds continuous batching on a paged key-value cache. A MinGRU has one state of fixed size per request
instead, so a batch is the rows of one cache: a separate prefill runs a request's prompt, the resulting state becomes a
row, and the row is removed when the request ends. transformers itself handles queues, threads, stopping, pausing,
cancelling and results.

Legend: B rows that generate, R rows of a prefill, T tokens of a piece of it, V vocabulary.
"""

import copy
import itertools
import operator
import queue
import threading
from numbers import Integral, Real
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import (
    BackgroundThreadStatus,
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler

# Defaults if the configuration sets none: how many rows generate at a time, and how many prompt tokens run between two
# of their steps, which bounds how long the rows wait.
_MAX_REQUESTS = 256
_MAX_TOKENS = 4096
_CHILD = "__child#"  # part of the names that transformers gives to additional sequences of a prompt

# Options of generate() that are refused, with the values that switch them off. They need beams, text, a second forward
# pass, a clock, or a prompt or a length that all rows share.
_NOT_IN_A_BATCH = {
    "num_beams": 1,
    "stop_strings": None,
    "guidance_scale": 1,
    "min_new_tokens": 0,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "forced_eos_token_id": None,
    "max_time": None,
}


class _LogitsProcessors(ContinuousBatchingLogitsProcessorList):
    """All of generate()'s processors, in order; those that read all tokens so far are called row by row."""

    def __init__(self, *args):
        super().__init__(*args)
        # Token ids of the last step's rows, kept so that a step need not convert all tokens again.
        self._ids: dict[FutureRequestState, Tensor] = {}

    def _validate_processors(self, drop_unsupported: bool) -> None:
        """Keep all processors: transformers drops some, because its batches hold only the last tokens."""

    def __call__(self, requests: list[FutureRequestState], scores: Tensor) -> Tensor:
        """requests of B rows, scores (B, V) -> (B, V)."""
        arguments = torch.empty(self.tensors_required, len(requests), dtype=torch.int32, device=scores.device)
        arguments = iter(self.prepare_tensor_args(requests, arguments))
        states, ids = [request.state for request in requests], None
        for processor in self.logits_processor:
            if isinstance(processor, ContinuousBatchingLogitsProcessor):
                scores = processor(scores, next(arguments))
            elif getattr(processor, "supports_continuous_batching", None):
                last = [(state.generated_tokens or state.initial_tokens)[-1] for state in states]
                scores = processor(torch.tensor(last, device=scores.device), scores)
            else:
                ids = self._ids_of(requests, scores.device) if ids is None else ids
                scores = torch.cat([processor(*pair) for pair in zip(ids, scores.split(1), strict=True)])
        return scores

    def _ids_of(self, requests: list[FutureRequestState], device: torch.device) -> list[Tensor]:
        """Return each row's (1, T) ids: a new request's prompt, or the previous step's ids and the token chosen."""
        new = [request.state.generated_tokens[-1:] or request.state.initial_tokens for request in requests]
        sizes = [len(tokens) for tokens in new]
        # A single copy to the device for all rows.
        new = torch.tensor([*itertools.chain.from_iterable(new)], device=device).unsqueeze(0).split(sizes, dim=1)
        rows = zip(requests, new, strict=True)
        self._ids = {row: torch.cat([self._ids[row], ids], dim=1) if row in self._ids else ids for row, ids in rows}
        return list(self._ids.values())

    def forget(self) -> None:
        """Drop the token ids of the last step's rows."""
        self._ids = {}


class _Scheduler(Scheduler):
    """First come, first served: a prefill takes as many waiting prompts as fit, padded, into the token budget."""

    def __init__(self, rows: "_Rows", max_requests: int, vocab_size: int):
        super().__init__(rows, safety_margin=0.0, max_requests_per_batch=max_requests)
        self.vocab_size = vocab_size

    def add_waiting_request(self, state: RequestState) -> None:
        """Add a request to the queue; if this raises, transformers fails only this request.

        Raises:
            ValueError: if the model cannot run the prompt, the temperature is not above 0, or an unfinished request
                has the same name.
        """
        for name in (state.request_id, *_names_of_children(state)):
            if name in self.active_requests or name in self.waiting_requests:
                raise ValueError(f"A request {name!r} already exists: give another request_id, or none.")
        temperature = state.logit_processor_kwargs.get("temperature")
        if isinstance(temperature, Real) and not temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {temperature}: for greedy decoding, leave it out and give top_k=1."
            )
        try:
            prompt = state.initial_tokens = [operator.index(token) for token in state.initial_tokens]
        except TypeError:
            raise ValueError("A prompt must be a list of token ids: give tokenizer(text).input_ids.") from None
        if not prompt or min(prompt) < 0 or max(prompt) >= self.vocab_size:
            got = f"{min(prompt)} to {max(prompt)}" if prompt else "none"
            raise ValueError(
                f"A prompt needs at least one token id, each between 0 and {self.vocab_size - 1}; got {got}."
            )
        super().add_waiting_request(state)

    def schedule_batch(self, token_budget: int, cache_budget: int = 0):
        """Choose the requests of the next prefill, and return them in the form of transformers' schedulers.

        A prompt longer than the budget is run alone. Requests with the same prompt share a row.
        """
        free = self.max_requests_per_batch - len(self.active_requests)
        chosen, prompts, longest = [], set(), 0
        for state in map(self.waiting_requests.get, self.waiting_requests_order):
            free -= 1 + state.num_children
            prompts.add(tuple(state.initial_tokens))
            longest = max(longest, len(state.initial_tokens))
            crowded = free < 0 or len(prompts) * longest > token_budget
            if crowded and (chosen or (free < 0 and self.active_requests)):
                break
            chosen.append(state)
        for state in chosen:
            state.status = RequestStatus.PREFILLING
            self.active_requests[state.request_id] = self.waiting_requests.pop(state.request_id)
            self.waiting_requests_order.popleft()
        futures = [FutureRequestState(state, True, {}, len(state.initial_tokens)) for state in chosen]
        return futures, False, sum(future.query_length for future in futures), 0


class _Rows:
    """The requests that are generating, and their states: row i of `cache` belongs to request i."""

    def __init__(self):
        self.requests: list[FutureRequestState] = []
        self.cache: DynamicCache | None = None
        self._gone: set[str] = set()

    def free_blocks(self, request_id: str) -> None:
        """Mark the row of an ended request for removal before the next step (called by the scheduler)."""
        self._gone.add(request_id)

    def join(self, requests: list[FutureRequestState], cache: DynamicCache) -> None:
        """Append new requests and the rows of their cache."""
        for own, new in zip(self.cache.layers if self.requests else (), cache.layers, strict=bool(self.requests)):
            new.states = torch.cat([own.states, new.states])
            if new.windows is not None:
                new.windows = torch.cat([own.windows, new.windows])
        self.requests, self.cache = self.requests + requests, cache

    def drop_ended(self) -> None:
        """Remove the rows of the requests that have ended."""
        kept = [row for row, request in enumerate(self.requests) if request.state.request_id not in self._gone]
        if len(kept) < len(self.requests):
            self.requests = [self.requests[row] for row in kept]
            device = self.cache.layers[0].states.device
            self.cache.batch_select_indices(torch.tensor(kept, dtype=torch.long, device=device))
        self._gone.clear()


def _input_device(model) -> torch.device:
    """Return the device for the input ids; for an offloaded embedding, the device on which its hook runs it."""
    if model.device.type != "meta":
        return model.device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", (hook,))]
    device = next((device for device in devices if device is not None), None)
    if device is None:
        raise ValueError("The model's weights are on the meta device: load them with from_pretrained().")
    return torch.device(device)


class _Prefill:
    """Left-padded prompts that run through the model in pieces, each within the token budget."""

    def __init__(self, requests: list[FutureRequestState], model, token_budget: int):
        prompts = list(dict.fromkeys(tuple(request.state.initial_tokens) for request in requests))
        length = max(map(len, prompts))
        self.padding = length - min(map(len, prompts))  # after this many tokens no row is padded
        self.requests = requests
        self.row = {prompt: row for row, prompt in enumerate(prompts)}
        device = _input_device(model)
        self.ids = torch.tensor([(0,) * (length - len(prompt)) + prompt for prompt in prompts], device=device)
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.mask = torch.arange(length, device=device) >= length - sizes.unsqueeze(1)  # (R, T)
        self.cache = DynamicCache(config=model.config)
        self.steps, self.done = token_budget // len(prompts), 0

    def active(self, scheduler: Scheduler) -> list[RequestState]:
        """Return the requests that have not been cancelled."""
        states = (request.state for request in self.requests)
        return [state for state in states if state.request_id in scheduler.active_requests]

    def advance(self, model, scheduler: Scheduler) -> Tensor | None:
        """Run the next piece; after the last one, return (requests, V) logits of the active requests, else None."""
        end = min(self.done + max(self.steps, 1), self.ids.shape[1])
        piece, mask = self.ids[:, self.done : end], self.mask[:, :end] if self.done < self.padding else None
        logits = model(piece, attention_mask=mask, cache=self.cache, logits_to_keep=1).logits[:, -1]
        self.done = end
        if end < self.ids.shape[1]:
            return None
        requests = [state for parent in self.active(scheduler) for state in _with_children(parent)]
        rows = [self.row[tuple(state.initial_tokens)] for state in requests]
        rows = torch.tensor(rows, dtype=torch.long, device=logits.device)
        self.requests = [FutureRequestState(state, True, {}, 1) for state in requests]
        self.cache.batch_select_indices(rows)
        return logits[rows]


def _with_children(state: RequestState) -> list[RequestState]:
    """Return the request and the copies of it that num_return_sequences asks for."""
    names, state.num_children = _names_of_children(state), 0
    return [state, *map(state.fork, names)]


def _names_of_children(state: RequestState) -> list[str]:
    return [f"{state.request_id}{_CHILD}{child}" for child in range(state.num_children)]


class _BatchProcessor(ContinuousBatchProcessor):
    """One iteration of the manager's thread: read the queues, run one step of all rows and one piece of a prefill.

    `__init__` does not call the parent's, which plans a paged key-value cache for the model's types of attention. It
    sets the attributes that the parent's other methods read.
    """

    def __init__(self, manager: "MinGRUBatchingManager"):
        config = manager.continuous_batching_config
        self.cb_config, self.logit_processor = config, manager.logit_processor
        self.input_queue = manager.input_queue if manager.is_tp_driver else None
        self.cancel_queue = manager.cancel_queue if manager.is_tp_driver else None
        self.output_router, self.background_thread_status = manager.output_router, manager.background_thread_status
        self.distributed_helper = manager.distributed_helper
        self.distributed_helper.set_tp_seed(config.seed, _input_device(manager.model))
        self.do_sample = bool(manager.generation_config.do_sample)
        self.max_tokens = config.max_batch_tokens or _MAX_TOKENS
        self.use_async_batching, self.inputs_and_outputs = False, SimpleNamespace(compute_stream=None)
        self.rows, self.prefill, self.sampled = _Rows(), None, []
        max_requests = config.max_requests_per_batch or _MAX_REQUESTS
        self.scheduler = _Scheduler(self.rows, max_requests, manager.model.config.vocab_size)

    def __repr__(self) -> str:
        active, waiting = self.scheduler.active_requests, self.scheduler.waiting_requests
        return f"{type(self).__name__}({len(active)} active requests, {len(waiting)} waiting)"

    def __del__(self) -> None:
        """Do nothing: there are no graphs to free.

        The parent's method runs a full garbage collection, which takes longer than many requests.
        """

    def prepare_next_batch(self) -> bool:
        """Read the queues, remove ended requests, and return whether there is anything to do."""
        if self._update_tp_group_state():
            return False
        self.scheduler.clear_cancelled_requests()
        self.rows.drop_ended()
        if not self.rows.requests:
            self.logit_processor.forget()
        if self.prefill is not None and not self.prefill.active(self.scheduler):
            self.prefill = None
        return self.scheduler.has_pending_requests()

    @torch.no_grad()
    def _generation_step(self, model) -> None:
        """Run one step of all rows and one piece of a prefill, and choose a token for each row."""
        requests, logits = self.rows.requests, []
        if requests:
            last = [[request.state.generated_tokens[-1]] for request in requests]
            last = torch.tensor(last, device=_input_device(model))  # (B, 1)
            logits.append(model(last, cache=self.rows.cache).logits[:, -1])
        if self.prefill is None:
            chosen = self.scheduler.schedule_batch(self.max_tokens)[0]
            self.prefill = _Prefill(chosen, model, self.max_tokens) if chosen else None
        first = None if self.prefill is None else self.prefill.advance(model, self.scheduler)
        if first is not None:
            logits.append(first)
            for request in self.prefill.requests:
                request.state.status = RequestStatus.DECODING
                self.scheduler.active_requests[request.state.request_id] = request.state
            self.rows.join(self.prefill.requests, self.prefill.cache)
            self.prefill = None
        self.sampled = self._sample(torch.cat(logits).float()) if logits else []

    def _sample(self, scores: Tensor) -> list[tuple[int, float | None]]:
        """scores (B, V) -> a token for each row, and its log-probability if return_logprobs is set, else None."""
        scores = self.logit_processor(self.rows.requests, scores)
        log_probs = scores.log_softmax(-1) if self.do_sample or self.cb_config.return_logprobs else None
        tokens = torch.multinomial(log_probs.exp(), 1) if self.do_sample else scores.argmax(-1, keepdim=True)
        if not self.cb_config.return_logprobs:
            return [(token, None) for token in tokens.flatten().tolist()]
        return list(zip(tokens.flatten().tolist(), log_probs.gather(1, tokens).flatten().tolist(), strict=True))

    def update_batch(self) -> None:
        """Append the tokens to their requests, finish those that are complete, and deliver outputs."""
        outputs = []
        for request, (token, log_prob) in zip(self.rows.requests if self.sampled else (), self.sampled, strict=True):
            state = request.state
            if state.update_and_check_completion(token, log_prob):
                self.scheduler.finish_request(state.request_id)
            if state.streaming or state.status == RequestStatus.FINISHED:
                outputs.append(state.to_generation_output())
        self.output_router.deliver_batch(outputs)

    def _handle_request_error(self, error: Exception, state: RequestState) -> None:
        """Fail a request, keeping its own tokens: the parent looks tokens up by name, which may not be unique."""
        self.output_router.fail_and_deliver(state, error)

    def fail_all_requests(self, error: Exception) -> None:
        """Fail all requests; those that are generating keep the tokens they have."""
        for state in (*self.scheduler.active_requests.values(), *self.scheduler.waiting_requests.values()):
            self._handle_request_error(error, state)
        self.scheduler.reset()


def _check_name(request_id: object) -> None:
    try:
        hash(request_id)
    except TypeError:
        raise ValueError(f"request_id must be a string, got {request_id!r}.") from None


class MinGRUBatchingManager(ContinuousBatchingManager):
    """Manager of a continuous batch of recurrent states, created by `model.init_continuous_batching()`.

    These fields of a ContinuousBatchingConfig have an effect: `max_requests_per_batch`, `max_batch_tokens` (prompt
    tokens that run between two steps of the generating requests), `return_logprobs`, `seed`, `max_queue_size` and
    `per_request_processors`. Fields for pages, attention and graphs are ignored.

    Args:
        model: a MinGRUForCausalLM.
        generation_config: generation options, without beams. If it has no eos_token_id, the model's is used.
        continuous_batching_config: see above.
        workload_hints: what generate_batch() knows about the coming requests.

    Raises:
        ValueError: if generation_config asks for something that a batch cannot do (beams, stop strings,
            min_new_tokens and others), or if nothing would end generate_batch().
    """

    def __init__(self, model, generation_config, continuous_batching_config=None, workload_hints=None):
        for name, off in _NOT_IN_A_BATCH.items():
            if getattr(generation_config, name, None) not in (None, off):
                raise ValueError(f"A continuous batch does not support {name}: leave it out, or call generate().")
        endless = workload_hints is not None and workload_hints.max_generated_length == 0
        owners = (generation_config, model.generation_config, model.config)
        ends = next((owner.eos_token_id for owner in owners if owner.eos_token_id is not None), None)
        if endless and ends is None:
            raise ValueError("There is no eos_token_id, so generation would never end: give max_new_tokens.")
        self.model, self.generation_config = model.eval(), copy.deepcopy(generation_config)
        self.generation_config.eos_token_id = ends  # set here: add_request() reads no other config
        model._prepare_special_tokens(self.generation_config, True, _input_device(model))  # some processors read them
        if continuous_batching_config is None:
            continuous_batching_config = ContinuousBatchingConfig()
        self.continuous_batching_config = continuous_batching_config
        self.num_return_sequences = generation_config.num_return_sequences or 1
        self.input_queue = queue.Queue(maxsize=continuous_batching_config.max_queue_size)
        self.cancel_queue = queue.Queue()
        self.background_thread_status, self.output_router = BackgroundThreadStatus(), OutputRouter()
        self.batch_processor = self._generation_thread = self._original_attn_impl = None
        self._request_counter, self._request_lock, self._wake_up_loop = 0, threading.Lock(), threading.Event()
        self._use_prefix_sharing = self.warmed_up = False
        self.distributed_helper = DistributedHelper(None, continuous_batching_config.cpu_group_timeout)
        self.is_tp_driver = self.distributed_helper.is_tp_driver
        self.logit_processor = _LogitsProcessors(
            # Some processors expect the length of the prompts; those that would use it are refused above.
            model._get_logits_processor(self.generation_config, input_ids_seq_length=1),
            continuous_batching_config.per_request_processors,
        )

    def add_request(self, input_ids, request_id=None, max_new_tokens=None, *args, **kwargs) -> str | None:
        """As in ContinuousBatchingManager.

        Raises:
            ValueError: if request_id or max_new_tokens is invalid: in the batch, this would fail all requests.
        """
        _check_name(request_id)
        if _CHILD in str(request_id):
            raise ValueError(
                f"request_id must not contain {_CHILD!r}, which is reserved for further sequences, got {request_id!r}."
            )
        if max_new_tokens is not None and not isinstance(max_new_tokens, Integral):
            raise ValueError(f"max_new_tokens must be an integer, got {max_new_tokens!r}.")
        return super().add_request(input_ids, request_id, max_new_tokens, *args, **kwargs)

    def cancel_request(self, request_id: str) -> None:
        """As in ContinuousBatchingManager.

        Raises:
            ValueError: if request_id is not hashable, so that no request can have this name.
        """
        _check_name(request_id)
        super().cancel_request(request_id)

    def switch_to_cb_friendly_attn(self, model, auto_switch_to_flash: bool = True) -> None:
        """Do nothing: there is no attention to switch."""

    def warmup(self) -> None:
        """Prepare nothing: a step has no graph and no fixed size."""
        self.warmed_up = True

    def _create_batch_processor(self) -> _BatchProcessor:
        self.batch_processor = _BatchProcessor(self)
        return self.batch_processor


__all__ = ["MinGRUBatchingManager"]
