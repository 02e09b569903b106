"""Checks of combinations of parameters whose values are each valid by themselves."""

from __future__ import annotations

from collections.abc import Mapping

from ..records.backends import SERVER_BACKEND, capabilities_of
from ..records.cell import DEPENDS_ON, DRAWN, LENGTHS, OF_ANSWERS, PARAMETERS, as_text
from ..records.errors import UsageError
from ..records.invocation import command_text
from ..records.quantizations import MIXED, schemes_with
from ..records.redaction import excerpt
from . import server_command
from .backend_checks import check_backend, requested_capabilities


def check_together(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Check a cell's parameters together. Raises UsageError on the first contradiction."""
    if "random" in axes["weights"]:
        texts = [w for w in axes["workload"] if w not in DRAWN]
        if texts and not requested_capabilities(axes).scripted:
            raise UsageError(
                f"workload={texts[0]} needs a tokenizer, and weights=random has none. "
                "Use workload=synthetic with random weights, or weights=hub."
            )
    drawn = [w for w in axes["workload"] if w in DRAWN]
    if None in axes["prompt_tokens"] and drawn:
        raise UsageError(
            f"prompt_tokens=auto has no meaning for workload={drawn[0]}. "
            "Give a number of tokens, or a workload with texts such as qa."
        )
    if axes["history"] != ("none",) and axes["prompt_tokens"] != (None,):
        asked = next(history for history in axes["history"] if history != "none")
        raise UsageError(
            f"history={asked} sends each turn of a conversation at its own length. Give prompt_tokens=auto."
        )
    _check_online(axes)
    _check_batching(axes)
    check_backend(axes)
    _check_decoding(axes)
    _check_mixed(axes)


def check_cluster(axes: Mapping[str, tuple[object, ...]], options: Mapping[str, object]) -> None:
    """Raise UsageError for what only this machine can do, if other machines are to measure."""
    on = options["on"]
    if on == "here":
        return
    if axes["worker_python"] != (None,):
        raise UsageError(
            f"worker_python is an interpreter of this machine, and on={on} measures on others. Leave one of them out."
        )
    if options["find"]:
        raise UsageError(
            f"find={options['find']} chooses each rate from the results before it, which on={on} cannot. "
            "Leave on out, or give the rates yourself: request_rate=1,2,4."
        )


def check_ranks(axes: Mapping[str, tuple[object, ...]], options: Mapping[str, object]) -> None:
    """Raise UsageError for what cannot be measured with several ranks."""
    ranks = max(int(str(count)) for count in axes["tensor_parallel"])
    if ranks == 1:
        return
    if options["on"] != "here":
        raise UsageError(
            f"tensor_parallel={ranks} starts its ranks on this machine, and on={options['on']} measures on others. "
            "Leave one of them out."
        )
    if axes["batching"] != (None,):
        raise UsageError(
            f"tensor_parallel={ranks} works for single batches only, and batching measures a stream of requests. "
            "Leave one of them out."
        )
    if "kept" in axes["history"]:
        raise UsageError(
            f"tensor_parallel={ranks} keeps no history between calls. Use history=none or history=recomputed."
        )
    if options["quality_tasks"]:
        raise UsageError(
            f"lm-eval calls the model in one process, and tensor_parallel={ranks} runs it in several. "
            "Leave quality_tasks out; quality=auto works."
        )


def check_placement(axes: Mapping[str, tuple[object, ...]], options: Mapping[str, object]) -> None:
    """Raise UsageError for what cannot be measured with a model that is laid out over several places."""
    if "auto" not in axes["placement"]:
        return
    if options["on"] != "here":
        raise UsageError(
            f"placement=auto lays a model out over the free memory of this machine, and on={options['on']} measures on "
            "others. Leave one of them out."
        )
    if options["quality_tasks"]:
        raise UsageError(
            "lm-eval moves the model to one device, and placement=auto keeps it in several places. "
            "Leave quality_tasks out; quality=auto works."
        )


def _check_mixed(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Require a budget or a plan, but not both, with quant=mixed only."""
    given = [name for name in ("quant_budget", "quant_plan") if axes[name] != (None,)]
    if MIXED in axes["quant"] and not given:
        raise UsageError(
            "quant=mixed needs a budget. "
            "Give quant_budget=5.5 (bits per weight) or 300MB (the whole model), or quant_plan=FILE."
        )
    if MIXED not in axes["quant"] and given:
        raise UsageError(f"{given[0]} is a setting of quant=mixed. Add quant=mixed, or leave it out.")
    if len(given) > 1:
        raise UsageError(
            "quant_plan gives a scheme for each block, and quant_budget asks to choose them. Give one of them."
        )


def _check_decoding(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse settings of a quantization or decode path that is not asked for, and what only plain decoding supports."""
    for name, (parameter, values) in DEPENDS_ON.items():
        if axes[name] != (PARAMETERS[name].default,) and not set(axes[parameter]) & set(values):
            raise UsageError(
                f"{name} is a setting of {parameter}={','.join(values)}. Add {parameter}={values[0]}, or leave it out."
            )
    grouped = schemes_with("group_size")
    if axes["group_size"] != (PARAMETERS["group_size"].default,) and not set(axes["quant"]) & set(grouped):
        raise UsageError(
            f"group_size is a setting of quant={','.join(grouped)}; others have their own groups. "
            f"Add quant={grouped[0]}, or leave it out."
        )
    if "assisted" in axes["decode"] and None in axes["assistant"]:
        raise UsageError(
            "decode=assisted needs a small model that proposes tokens. "
            "Give assistant=MODEL, one with the same vocabulary."
        )
    other = next((f"decode={decode}" for decode in axes["decode"] if decode != "generate"), None)
    other = other or next((f"kv_cache={cache}" for cache in axes["kv_cache"] if cache is not None), None)
    if other and axes["batching"] != (None,):
        raise UsageError(
            f"{other} works for single batches only, and batching measures a stream of requests. Leave one of them out."
        )
    history = next((history for history in axes["history"] if history != "none"), None)
    if history and other and (axes["decode"] != ("generate",) or "kept" in axes["history"]):
        raise UsageError(
            f"history={history} cannot be measured with {other}. "
            "Use decode=generate with kv_cache=auto, or history=none."
        )


def _check_online(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Require a server and its backend together, and refuse parameters that exclude each other."""
    _check_server(axes)
    _check_requests(axes)
    _check_launch(axes)
    _check_load(axes)
    _check_conversations(axes)
    _check_prefixes(axes)
    _check_trace(axes)


def _check_server(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Require a server and its backend together, and refuse settings of the model, which the server has."""
    server, backend = axes["url"][0] or axes["launch"][0], axes["backend"][-1]
    online = requested_capabilities(axes).online
    if server and not online:
        which = "url" if axes["url"][0] else "launch"
        raise UsageError(
            f"{which} is given, and backend={backend} runs the model in this process. "
            f"Add backend={SERVER_BACKEND}, or use `{command_text('online')}`."
        )
    if online and not server:
        raise UsageError(
            f"backend={backend} needs the address of a server. Give url=http://127.0.0.1:8000, or launch=COMMAND."
        )
    given = [
        name
        for name, f in PARAMETERS.items()
        if name in axes and f.metadata["scenarios"] == ["online"] and axes[name] != (f.default,)
    ]
    if given and not server:
        raise UsageError(f"{given[0]} has a meaning only if a server is measured. Give url=http://…, or leave it out.")
    if server and axes["worker_python"] != (None,):
        raise UsageError("worker_python runs a model in another environment, and a server has its own. Leave it out.")
    own = (
        axes["batch_size"] != (1,)
        or axes["weights"] != ("hub",)
        or (axes["url"] != (None,) and axes["quant"] != ("none",))
    )
    if server and own:
        raise UsageError(
            "batch_size, quant and weights are the server's own settings, which a client cannot change. "
            "Start the server with them."
        )


def _check_requests(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse settings of requests and connections that this server or endpoint cannot have."""
    if axes["thinking"] == ("off",) and axes["endpoint"] != ("chat",):
        raise UsageError(
            "thinking=off is for endpoint=chat, and endpoint is completions, whose prompts have no template. "
            "Give endpoint=chat, or leave thinking out."
        )
    _check_endpoint(axes)
    of_tls = next((name for name in ("tls_ca", "tls_cert", "tls_key") if axes[name] != (None,)), None)
    if of_tls and not str(axes["url"][0]).startswith("https:"):
        raise UsageError(f"{of_tls} is for a server behind https, and url is {axes['url'][0]}. Leave it out.")
    if axes["tls_key"] != (None,) and axes["tls_cert"] == (None,):
        raise UsageError("tls_key is the key of a certificate, and none is given. Give tls_cert.")
    if axes["proxy"] != (None,) and axes["launch"] != (None,):
        raise UsageError("proxy=environment is for a server elsewhere, and launch starts one here. Leave proxy out.")


def _check_endpoint(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse settings of answers that the endpoint does not have."""
    if axes["endpoint"] == ("embeddings",):
        given = [name for name in OF_ANSWERS if axes[name] != (PARAMETERS[name].default,)]
        if given:
            raise UsageError(
                f"endpoint=embeddings has answers without tokens, and {given[0]} is given. Leave it out; slo_e2e_ms "
                "limits the time of an answer."
            )
    if axes["endpoint"] == ("responses",) and axes["max_tokens_field"] != ("auto",):
        raise UsageError(
            "max_tokens_field is for completions and chat; endpoint=responses always has max_output_tokens. "
            "Leave it out."
        )


def _check_load(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse settings of an open loop and of a closed one together, and shapes of arrivals that are not asked for."""
    rates = [rate for rate in axes["request_rate"] if rate is not None]
    if rates and axes["concurrency"] != (PARAMETERS["concurrency"].default,):
        raise UsageError("request_rate is for an open loop and concurrency for a closed one. Give one of them.")
    top = axes["ramp_to"][0]
    if top is not None and not all(isinstance(rate, float) and rate < float(str(top)) for rate in axes["request_rate"]):
        raise UsageError(
            f"ramp_to, where a ramp ends, is {as_text('ramp_to', top)}, and request_rate, where it begins, is "
            f"{','.join(as_text('request_rate', rate) for rate in axes['request_rate'])}. Give a lower request_rate."
        )
    if axes["burstiness"] != (1.0,) and axes["arrival"] != ("gamma",):
        raise UsageError(
            f"burstiness is the shape of arrival=gamma, and arrival is {axes['arrival'][0]}. Add arrival=gamma."
        )


def _check_launch(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse `launch` together with `url`, an empty command, and commands without {quant} if quant is given."""
    commands = [str(command) for command in axes["launch"] if command is not None]
    if not commands:
        return
    if axes["url"] != (None,):
        raise UsageError("url is for a running server, and launch starts one. Give one of them.")
    if None in axes["launch"]:
        raise UsageError("launch=none starts no server to measure. Leave none out of the list.")
    without_quant = next((command for command in commands if not server_command.takes(command, "quant")), None)
    if axes["quant"] != ("none",) and without_quant:
        asked = ",".join(map(str, axes["quant"]))
        raise UsageError(
            f"quant={asked} is asked for, and the server is not told: {excerpt(without_quant, 100)}. "
            "Add its option for it with {quant}."
        )


def check_offline_baseline(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Require that `twin` compares a launched server with one batch of one length, in a quantization we can load."""
    if axes["launch"] == (None,) or not requested_capabilities(axes).offline_baseline:
        raise UsageError(
            "twin measures a server that launch starts, and the same without it. "
            "Give launch=COMMAND, or leave twin out."
        )
    stream = {
        "request_rate": (None,),
        "trace": (None,),
        "history": ("none",),
        "endpoint": ("completions",),
        "duration_s": (None,),
        "prefix_tokens": (None,),
    }
    if axes["ignore_eos"] == ("false",):
        raise UsageError(
            "twin compares answers of one length, and ignore_eos=false lets each end by itself. Leave it out."
        )
    given = [name for name, plain in stream.items() if axes[name] != plain]
    given += ["workload=mixed"] if "mixed" in axes["workload"] else []
    if given:
        raise UsageError(
            "twin compares with one batch of one length, as many rows as concurrency, and "
            f"{given[0]} does not fit that. Leave one of them out."
        )
    baseline = capabilities_of(requested_capabilities(axes).offline_baseline)
    known = (baseline, *map(capabilities_of, baseline.delegates))
    quantizations = list(dict.fromkeys(quant for own in known for quant in own.quantizations))
    unknown = next(
        (quant for quant in axes["quant"] if server_command.offline_quant(str(quant)) not in quantizations), None
    )
    if unknown is not None:
        raise UsageError(
            f"quant={unknown} is the server's own word, and twin cannot load it here. "
            f"Known here: {', '.join(quantizations)}."
        )


def check_find(axes: Mapping[str, tuple[object, ...]], twin: bool) -> None:
    """Require SLOs to meet and a server, and refuse every load but one request rate to start from."""
    if not requested_capabilities(axes).online:
        raise UsageError("find=goodput sends requests to a server. Give url=http://… or launch=COMMAND.")
    if all(axes[name] == (None,) for name in ("slo_ttft_ms", "slo_tpot_ms", "slo_e2e_ms")):
        raise UsageError(
            "find=goodput searches for the highest rate that meets limits, and none is given. "
            "Give slo_ttft_ms, slo_tpot_ms, slo_e2e_ms or slo."
        )
    loads = {"concurrency": (1,), "ramp_to": (None,), "trace": (None,), "history": ("none",), "processes": (1,)}
    given = next((name for name, plain in loads.items() if axes[name] != plain), "twin" if twin else None)
    if given:
        raise UsageError(
            f"find=goodput searches among rates of an open loop, and {given} is another load. Leave one of them out."
        )


def _check_conversations(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Require history=sent, endpoint=chat and a closed loop for conversations with a server, a server for `sent`."""
    server, histories = axes["url"][0] or axes["launch"][0], axes["history"]
    own = [history for history in histories if history in ("recomputed", "kept")]
    if server and own:
        raise UsageError(
            f"history={own[0]} is for a model in this process; a server gets the history with each turn. "
            "Use history=sent."
        )
    if "sent" not in histories:
        return
    if not server:
        raise UsageError(
            "history=sent is for a server. Use history=recomputed or history=kept for a model in this process."
        )
    if axes["endpoint"] != ("chat",):
        raise UsageError(
            "history=sent sends the messages of a conversation, and endpoint=completions takes one prompt. "
            "Give endpoint=chat."
        )
    if axes["request_rate"] != (None,) or axes["trace"] != (None,):
        raise UsageError(
            "history=sent is a closed loop: each user waits for an answer before the next turn. "
            "Give concurrency, and no request_rate or trace."
        )


def _check_prefixes(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse prefixes that are no part of a prompt, and where another parameter says what prompts share."""
    prefixes = [int(str(tokens)) for tokens in axes["prefix_tokens"] if tokens is not None]
    if not prefixes:
        if axes["prefix_count"] != (PARAMETERS["prefix_count"].default,):
            raise UsageError("prefix_count is a number of prefixes, and none has tokens. Give prefix_tokens.")
        return
    lengths = [int(str(tokens)) for tokens in axes["prompt_tokens"] if tokens is not None]
    if lengths and max(prefixes) >= min(lengths):
        raise UsageError(
            f"prefix_tokens is the part of a prompt that requests share, and prefix_tokens={max(prefixes)} is not less "
            f"than prompt_tokens={min(lengths)}. Give a smaller prefix, or longer prompts."
        )


def _check_trace(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse times and lengths beside a trace, which has its own."""
    if axes["trace"] == (None,):
        return
    replaced = ("request_rate", "ramp_to", "concurrency", "arrival", "burstiness", *LENGTHS, "prefix_tokens")
    given = [name for name in replaced if axes[name] != (PARAMETERS[name].default,)]
    if given:
        raise UsageError(
            f"A trace says when requests come, how long they are and what they share, and {given[0]} is given too. "
            "Leave one of them out."
        )
    if "mixed" in axes["workload"]:
        raise UsageError(
            "A trace has its own lengths, and workload=mixed draws them. "
            "Use workload=synthetic, or a workload with texts."
        )


def _check_batching(axes: Mapping[str, tuple[object, ...]]) -> None:
    """Require a rate and a way of batching in every cell of an in-process stream; refuse stream settings elsewhere."""
    server, batching = axes["url"][0] or axes["launch"][0], axes["batching"]
    own = [name for name in ("batching", "batch_wait_ms") if axes[name] != (PARAMETERS[name].default,)]
    if server and own:
        raise UsageError(
            f"{own[0]} is for a model in this process, and the server batches as it was started. Leave it out."
        )
    if None in batching and len(batching) > 1:
        raise UsageError(
            "batching=none measures single batches and no stream of requests, so it is not comparable. "
            "Leave none out of the list."
        )
    if batching != (None,):
        if axes["history"] != ("none",):
            raise UsageError(
                "batching measures a stream of single requests, and history is for conversations. "
                "Leave one of them out."
            )
        if None in axes["request_rate"]:
            raise UsageError(
                "batching needs a stream of requests. "
                "Give request_rate, requests per second; a high one is a backlog that is there at once."
            )
        if axes["batch_wait_ms"] != (PARAMETERS["batch_wait_ms"].default,) and "dynamic" not in batching:
            raise UsageError(
                "batch_wait_ms is how long batching=dynamic waits for a full batch. "
                "Add batching=dynamic, or leave it out."
            )
    elif not server:
        given = [
            n
            for n in axes
            if "offline" not in PARAMETERS[n].metadata["scenarios"] and axes[n] != (PARAMETERS[n].default,)
        ]
        if given:
            raise UsageError(
                f"{given[0]} is for a stream of requests. "
                "Add batching=static,dynamic,continuous, or measure a server with url=http://…."
            )
        if "mixed" in axes["workload"]:
            raise UsageError(
                "workload=mixed is a stream of requests of varying lengths, and one batch has one exact length. "
                "Add batching=static,dynamic,continuous and request_rate, or measure a server with "
                f"`{command_text('online')}`."
            )
