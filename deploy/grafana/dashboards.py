# SPDX-License-Identifier: Apache-2.0
"""The dashboards: an operator's questions, and the queries that answer them.

Overview: is the service healthy, is pruning on, what does it gain? Savings: how much does pruning
save, and at what cost? Engine: vLLM's own metrics. Gateway: who sends requests, who is refused, how
much time does the gateway itself take?
"""

from __future__ import annotations

from dataclasses import replace

from .panels import (
    CRITERION,
    TARGETS,
    Dashboard,
    Panel,
    Query,
    Row,
    plugin,
    pruned_and_not,
    quantile,
    quantiles,
    rate,
    ratio,
    value,
)

_PRUNED = 'outcome=~"pruned|reused"'
_PRUNED_SHARE = ratio(plugin("himap_requests_total", _PRUNED), plugin("himap_requests_total"))
_ERRORS = rate("himap_http_requests_total", 'status=~"5.."')
_BROUGHT = "himap_image_tokens_by_outcome_total"
_HELD = plugin("himap_kv_blocks_total")
_SAVED = plugin("himap_kv_blocks_saved_total")
_BLOCKS_SAVED = ratio(_SAVED, f"({_SAVED} + {_HELD})")
_FLOPS_AVOIDED = "1 - " + ratio(
    rate("himap_prefill_flops_total"), rate("himap_prefill_flops_unpruned_total")
)


def _kept(stage: int, by: tuple[str, ...] = ()) -> str:
    return ratio(
        plugin("himap_image_tokens_total", f'stage="{stage}"', by),
        plugin("himap_image_tokens_total", 'stage="0"', by),
    )


_BY_TOKEN_OUTCOME = (
    f"{plugin(_BROUGHT, by=('outcome',))} / ignoring (outcome) group_left () "
    f"({plugin(_BROUGHT)} > 0)"
)


def _blocks(by: tuple[str, ...]) -> tuple[str, str]:
    """KV blocks that pruned prompts held, and would have held."""
    held, saved = (plugin(f"himap_kv_blocks{end}_total", by=by) for end in ("", "_saved"))
    return held, f"({saved} + {held})"


_PRUNED_STAT = Panel(
    "Prompts pruned",
    "Share of the prompts with images that were pruned, now or before (`reused`). At 0 %, pruning "
    "is off, or clients turn it off. The savings dashboard shows bypassed prompts.",
    (Query(_PRUNED_SHARE),),
    "percentunit",
    "stat",
    3,
)
_BLOCKS_STAT = Panel(
    "KV blocks saved",
    "Of the KV cache blocks that pruned prompts would hold without pruning, the share that was "
    "not allocated. Counted from the block tables.",
    (Query(_BLOCKS_SAVED),),
    "percentunit",
    "stat",
    3,
)
_FLOPS_STAT = Panel(
    "Prefill FLOPs avoided",
    "Share of the decoder's prefill, over all prompts with images, pruned or not. The vision "
    "tower does not count.",
    (Query(_FLOPS_AVOIDED),),
    "percentunit",
    "stat",
    3,
)
_FIT_STAT = Panel(
    "Requests that fit",
    "How many pruned prompts fit in the KV blocks of one unpruned prompt.",
    (Query(ratio(f"({_SAVED} + {_HELD})", _HELD)),),
    "suffix: x",
    "stat",
    3,
)
_WAITING = Panel(
    "Running and waiting",
    "Requests in the engine. If more and more wait, capacity is too small.",
    (
        Query(f"sum({value('vllm:num_requests_running')})", "running"),
        Query(f"sum({value('vllm:num_requests_waiting')})", "waiting"),
    ),
)
_KV_USE = Panel(
    "KV cache used",
    "Per engine. Close to 100 %, requests wait or are preempted.",
    (
        Query(
            f"max by (instance, engine) ({value('vllm:kv_cache_usage_perc')})",
            "{{instance}} engine {{engine}}",
        ),
    ),
    "percentunit",
)
_REFUSED = Panel(
    "Not answered, by reason",
    "Requests refused or failed. `key`: no valid API key; `rate`, `concurrency`: the key's limits; "
    "`image_*`: the picture; `loading`, `draining`, `failed`: the service; `engine_busy`: vLLM's "
    "queue limits; `timeout`; `client_went_away`.",
    (Query(rate("himap_refused_requests_total", by=["reason"]), "{{reason}}"),),
    "reqps",
    stacked=True,
)
_BY_OUTCOME = Panel(
    "Prompts with images, by outcome",
    "`pruned`; `reused`: the prefix cache had all images as they were pruned before; `unpruned`: "
    "the request's ratios, or the default ones, are 0; `bypassed_*`: the server's default asks for "
    "pruning, but the request cannot be pruned, for the named reason.",
    (Query(plugin("himap_requests_total", by=["outcome"]), "{{outcome}}"),),
    "reqps",
    stacked=True,
)

OVERVIEW = Dashboard(
    "himap-overview",
    "HiMAP overview",
    "**Healthy?** No alert, nothing unreachable, no 5xx, nothing waiting. "
    "**Is pruning on?** *Prompts pruned* above 0 %. "
    "**What does it save?** *KV blocks saved* and *Prefill FLOPs avoided*; *HiMAP savings* has the "
    "details. **What does it gain?** Compare the time to first token of pruned and unpruned "
    "requests, all with images. "
    "**Not healthy?** `docs/runbooks.md` in the repository has a section for each alert.",
    (
        Row(
            "Now",
            (
                Panel(
                    "Requests",
                    "Requests to /v1, answered or not.",
                    (Query(rate("himap_http_requests_total")),),
                    "reqps",
                    "stat",
                    3,
                ),
                Panel(
                    "5xx",
                    "Share of the requests that failed because of the service.",
                    (
                        Query(
                            f"({_ERRORS} or vector(0)) / ({rate('himap_http_requests_total')} > 0)"
                        ),
                    ),
                    "percentunit",
                    "stat",
                    3,
                    (0.01, 0.05),
                ),
                Panel(
                    "First token, p95",
                    "Time from a request's arrival at the gateway to its first token.",
                    pruned_and_not("himap_time_to_first_token_seconds", [0.95]),
                    "s",
                    "stat",
                    6,
                    (2.5, 5),
                ),
                Panel(
                    "Waiting",
                    "Requests that wait for the engine.",
                    (Query(f"sum({value('vllm:num_requests_waiting')})"),),
                    "short",
                    "stat",
                    3,
                    (5, 20),
                ),
                Panel(
                    "KV cache used",
                    "The fullest engine.",
                    (Query(f"max({value('vllm:kv_cache_usage_perc')})"),),
                    "percentunit",
                    "stat",
                    3,
                    (0.8, 0.9),
                ),
                Panel(
                    "Unreachable",
                    "Gateways that do not answer Prometheus.",
                    (Query('count(up{job=~"$job"} == 0) or vector(0)'),),
                    "short",
                    "stat",
                    3,
                    (1, 1),
                ),
                Panel(
                    "Alerts",
                    "Alerts that fire now. The table below names them.",
                    (
                        Query(
                            'count(ALERTS{alertname=~"Himap.+", alertstate="firing"}) or vector(0)'
                        ),
                    ),
                    "short",
                    "stat",
                    3,
                    (1, 2),
                ),
                *(replace(panel, width=6) for panel in (_PRUNED_STAT, _BLOCKS_STAT, _FLOPS_STAT)),
                replace(_FIT_STAT, width=6),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests by status",
                    "499: the client went away.",
                    (Query(rate("himap_http_requests_total", by=["status"]), "{{status}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Tokens",
                    "Prompt tokens as the client sent them, image tokens included, and generated "
                    "tokens.",
                    (
                        Query(rate("vllm:prompt_tokens_total"), "prompt"),
                        Query(rate("vllm:generation_tokens_total"), "generated"),
                    ),
                    "short",
                ),
                _REFUSED,
            ),
        ),
        Row(
            "Latency, pruned and not",
            (
                Panel(
                    "Time to first token",
                    "Time from a request's arrival at the gateway. This is what pruning shortens.",
                    pruned_and_not("himap_time_to_first_token_seconds"),
                    "s",
                ),
                Panel(
                    "Time per output token",
                    "Mean of a request's tokens after the first. Pruning shortens it only because"
                    " a smaller KV cache is read.",
                    pruned_and_not("himap_time_per_output_token_seconds"),
                    "s",
                ),
                Panel(
                    "Whole answer",
                    "Time from a request's arrival to the end of its answer. Long answers take "
                    "longer.",
                    pruned_and_not("himap_e2e_request_latency_seconds"),
                    "s",
                ),
            ),
        ),
        Row(
            "Saturation",
            (
                _WAITING,
                _KV_USE,
                Panel(
                    "Preemptions",
                    "Requests that lost their KV cache blocks and are computed again.",
                    (Query(rate("vllm:num_preemptions_total", by=["instance"]), "{{instance}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Alerts",
            (
                Panel(
                    "Firing",
                    "docs/runbooks.md says what to do, in the section with the alert's name.",
                    (
                        Query(
                            "sum by (alertname, severity, instance, model_name) "
                            '(ALERTS{alertname=~"Himap.+", alertstate="firing"})'
                        ),
                    ),
                    kind="table",
                    width=24,
                    idle_only="a healthy service has no firing alert",
                ),
            ),
        ),
    ),
)

SAVINGS = Dashboard(
    "himap-savings",
    "HiMAP savings",
    "What pruning drops, saves and costs. Image tokens and KV blocks count **pruned** prompts, in "
    "the engine, from the block tables. KV entries, FLOPs, and image tokens by outcome count "
    "**all** prompts with images. "
    "Requests choose their own ratios; the *share kept* is the result. If prompts are pruned but "
    "nothing is saved, see `HimapPruningSavesNothing` in the repository's `docs/runbooks.md`.",
    (
        Row(
            "Now",
            (
                _PRUNED_STAT,
                Panel(
                    "Image tokens kept",
                    "Share of pruned prompts' image tokens left after the second cut.",
                    (Query(_kept(2)),),
                    "percentunit",
                    "stat",
                    3,
                ),
                _BLOCKS_STAT,
                _FLOPS_STAT,
                _FIT_STAT,
                Panel(
                    "KV memory saved",
                    "Bytes not allocated to prompts, summed over the dashboard's time range. "
                    "Blocks are reused, so the sum can exceed the memory of the KV cache.",
                    (Query(plugin("himap_kv_saved_bytes_total", function="increase")),),
                    "bytes",
                    "stat",
                    3,
                ),
                Panel(
                    "Cost per pruning step",
                    "Mean host time of scoring and selection in engine steps that pruned. On a GPU "
                    "this is the time to launch their kernels.",
                    (
                        Query(
                            ratio(
                                plugin("himap_pruning_seconds_total"),
                                plugin("himap_pruning_steps_total"),
                            )
                        ),
                    ),
                    "s",
                    "stat",
                    3,
                ),
                Panel(
                    "Share of time spent",
                    "Pruning's host time per second of wall time, over all instances.",
                    (Query(plugin("himap_pruning_seconds_total")),),
                    "percentunit",
                    "stat",
                    3,
                ),
            ),
        ),
        Row(
            "Image tokens",
            (
                _BY_OUTCOME,
                Panel(
                    "Image tokens by stage",
                    "Image tokens of pruned prompts: sent, left after the first cut, left after "
                    "the second.",
                    tuple(
                        Query(plugin("himap_image_tokens_total", f'stage="{stage}"'), name)
                        for stage, name in (
                            (0, "sent"),
                            (1, "after first cut"),
                            (2, "after second cut"),
                        )
                    ),
                ),
                Panel(
                    "Share kept, prompt by prompt",
                    "Share left after the second cut, over all prompts with images. Prompts that "
                    "were not pruned have 100 %. A wide spread means that clients choose ratios.",
                    tuple(
                        Query(
                            quantile(q, "himap_prompt_kept_share", 'stage="2"'),
                            f"p{round(100 * q)}",
                        )
                        for q in (0.1, 0.5, 0.9)
                    ),
                    "percentunit",
                ),
                Panel(
                    "Share kept",
                    "Share of pruned prompts' image tokens, as a result of the ratios that were "
                    "used. The defaults 0.5 and 0.75 leave 50 % and 12.5 %.",
                    (
                        Query(_kept(1), "after first cut"),
                        Query(_kept(2), "after second cut"),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Share kept, by criterion",
                    "The same for the engines of each criterion; two names are those of the first "
                    "and of the second cut. Ratios decide how much is kept, not the criterion: "
                    "engines that differ here get other requests, or have other default ratios.",
                    tuple(
                        Query(_kept(cut, (CRITERION,)), f"{{{{criterion}}}}, after {name} cut")
                        for cut, name in ((1, "first"), (2, "second"))
                    ),
                    "percentunit",
                ),
                Panel(
                    "Image tokens brought, by outcome",
                    "Of the image tokens in prompts, the share of each outcome. `pruned`: of "
                    "images that were scored and pruned; `reused`: found in the prefix cache as "
                    "they were pruned before; `unpruned`: of images that stay whole.",
                    (Query(_BY_TOKEN_OUTCOME, "{{outcome}}"),),
                    "percentunit",
                    stacked=True,
                ),
            ),
        ),
        Row(
            "KV cache and compute",
            (
                Panel(
                    "KV blocks of pruned prompts",
                    "Blocks allocated per second, and blocks that pruning did not allocate.",
                    (Query(_HELD, "held"), Query(_SAVED, "saved")),
                    stacked=True,
                ),
                Panel(
                    "KV entries of prompts with images",
                    "Token-layers of all prompts with images, per second: with pruning as it was, "
                    "and without pruning.",
                    (
                        Query(rate("himap_prompt_kv_tokens_total"), "as is"),
                        Query(rate("himap_prompt_kv_tokens_unpruned_total"), "without pruning"),
                    ),
                ),
                Panel(
                    "Prefill FLOPs",
                    "FLOPs of the decoder for prompts with images, per second: with pruning as it "
                    "was, and without pruning.",
                    (
                        Query(rate("himap_prefill_flops_total"), "done"),
                        Query(rate("himap_prefill_flops_unpruned_total"), "without pruning"),
                    ),
                    "flops",
                ),
            ),
        ),
        Row(
            "Gain and cost",
            (
                Panel(
                    "Time to first token, p50 and p95",
                    "Pruned and unpruned requests, all with images.",
                    pruned_and_not("himap_time_to_first_token_seconds", [0.5, 0.95]),
                    "s",
                ),
                Panel(
                    "Scoring and selection",
                    "Host time per engine step that pruned.",
                    (
                        Query(
                            ratio(
                                plugin("himap_pruning_seconds_total", by=["instance"]),
                                plugin("himap_pruning_steps_total", by=["instance"]),
                            ),
                            "{{instance}}",
                        ),
                    ),
                    "s",
                ),
                Panel(
                    "Pruned prompts computed again",
                    "Recomputed after a preemption, with the same result.",
                    (Query(plugin("himap_recomputed_total", by=["instance"]), "{{instance}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "By model",
            (
                Panel(
                    "Settings",
                    "The layers of the cuts, the ratios for requests that do not choose, and the "
                    "criteria.",
                    (
                        Query(
                            "max by (instance, model_name, shallow_layer, deep_layer, "
                            f"shallow_ratio, deep_ratio, criterion) ({value('himap_info')})"
                        ),
                    ),
                    kind="table",
                    width=24,
                ),
                Panel(
                    "Prompts pruned",
                    "Share of the prompts with images, `reused` ones included.",
                    (
                        Query(
                            ratio(
                                plugin("himap_requests_total", _PRUNED, by=["model_name"]),
                                plugin("himap_requests_total", by=["model_name"]),
                            ),
                            "{{model_name}}",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Image tokens kept",
                    "Share of pruned prompts' image tokens left after the second cut.",
                    (Query(_kept(2, ("model_name",)), "{{model_name}}"),),
                    "percentunit",
                ),
                Panel(
                    "Requests that fit",
                    "How many pruned prompts fit in the KV blocks of one unpruned prompt.",
                    (Query(ratio(*reversed(_blocks(("model_name",)))), "{{model_name}}"),),
                    "suffix: x",
                ),
                Panel(
                    "KV memory saved per second",
                    "Bytes not allocated to prompts.",
                    (
                        Query(
                            plugin("himap_kv_saved_bytes_total", by=["model_name"]),
                            "{{model_name}}",
                        ),
                    ),
                    "Bps",
                ),
                Panel(
                    "Prefill FLOPs avoided",
                    "Over all prompts with images.",
                    (
                        Query(
                            "1 - "
                            + ratio(
                                rate("himap_prefill_flops_total", by=["model_name"]),
                                rate("himap_prefill_flops_unpruned_total", by=["model_name"]),
                            ),
                            "{{model_name}}",
                        ),
                    ),
                    "percentunit",
                ),
            ),
        ),
    ),
)

ENGINE = Dashboard(
    "himap-engine",
    "HiMAP engine (vLLM)",
    "vLLM's own metrics, of the engine behind the gateway. Token counts are logical: what the "
    "client sent, before pruning. KV cache use is physical: pruning lowers it.",
    (
        Row(
            "Load",
            (
                _WAITING,
                Panel(
                    "Waiting, by reason",
                    "`capacity`: no room in the batch or the KV cache.",
                    (
                        Query(
                            f"sum by (reason) ({value('vllm:num_requests_waiting_by_reason')})",
                            "{{reason}}",
                        ),
                    ),
                ),
                _KV_USE,
                Panel(
                    "Finished, by reason",
                    "`length`: `max_tokens` or the context length was reached; `abort`: the "
                    "client went away.",
                    (
                        Query(
                            rate("vllm:request_success_total", by=["finished_reason"]),
                            "{{finished_reason}}",
                        ),
                    ),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Refused by the engine's queue limits",
                    "The limits are --max-num-queued-reqs and --max-num-queued-tokens.",
                    (Query(rate("vllm:admission_rejections_total", by=["reason"]), "{{reason}}"),),
                    "reqps",
                ),
                Panel(
                    "Preemptions",
                    "Requests that lost their KV cache blocks and are computed again.",
                    (Query(rate("vllm:num_preemptions_total", by=["engine"]), "{{engine}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Throughput",
            (
                Panel(
                    "Prompt tokens, by source",
                    "Tokens computed here, and tokens found in a cache.",
                    (
                        Query(
                            rate("vllm:prompt_tokens_by_source_total", by=["source"]), "{{source}}"
                        ),
                    ),
                    stacked=True,
                ),
                Panel(
                    "Generated tokens",
                    "Tokens per second over all engines.",
                    (Query(rate("vllm:generation_tokens_total"), "generated"),),
                ),
                Panel(
                    "Tokens per engine step",
                    "Prefill and decode together, at most --max-num-batched-tokens.",
                    quantiles("vllm:iteration_tokens_total"),
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel(
                    "Time to first token",
                    "As the engine sees it. The gateway adds the time for reading and checking "
                    "images.",
                    quantiles("vllm:time_to_first_token_seconds"),
                    "s",
                ),
                Panel(
                    "Between tokens",
                    "Time between tokens of all requests.",
                    quantiles("vllm:inter_token_latency_seconds"),
                    "s",
                ),
                Panel(
                    "Whole request",
                    "Time in the engine.",
                    quantiles("vllm:e2e_request_latency_seconds"),
                    "s",
                ),
                Panel(
                    "Where the time goes, p95",
                    "Waiting, prefill, decode.",
                    tuple(
                        Query(quantile(0.95, f"vllm:request_{part}_time_seconds"), part)
                        for part in ("queue", "prefill", "decode")
                    ),
                    "s",
                ),
                Panel(
                    "Time per output token",
                    "Mean per request.",
                    quantiles("vllm:request_time_per_output_token_seconds"),
                    "s",
                ),
                Panel(
                    "Prompt tokens computed",
                    "Per request, without cached tokens; logical, before pruning.",
                    quantiles("vllm:request_prefill_kv_computed_tokens"),
                ),
            ),
        ),
        Row(
            "Caches and shape of the work",
            (
                Panel(
                    "Prefix cache hits",
                    "Share of the tokens looked up, those of pruned prompts included. Images that "
                    "are pruned in one way serve no prompt that is pruned in another.",
                    (
                        Query(
                            ratio(
                                rate("vllm:prefix_cache_hits_total"),
                                rate("vllm:prefix_cache_queries_total"),
                            ),
                            "hits",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Image cache hits",
                    "Share of the images that had been processed before.",
                    (
                        Query(
                            ratio(
                                rate("vllm:mm_cache_hits_total"),
                                rate("vllm:mm_cache_queries_total"),
                            ),
                            "hits",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Prompt length",
                    "Tokens per request, image tokens included.",
                    quantiles("vllm:request_prompt_tokens"),
                ),
                Panel(
                    "Answer length",
                    "Tokens per request.",
                    quantiles("vllm:request_generation_tokens"),
                ),
                Panel(
                    "Requests that fit at the current mix",
                    "Running requests divided by the share of the KV cache that they fill: the "
                    "number of such requests that would fill it. Inexact when few run.",
                    (
                        Query(
                            "sum(avg_over_time("
                            f"{value('vllm:num_requests_running')}[$__rate_interval])) / "
                            "(sum(avg_over_time("
                            f"{value('vllm:kv_cache_usage_perc')}[$__rate_interval])) > 0)",
                            "requests",
                        ),
                    ),
                ),
                Panel(
                    "KV cache settings",
                    "Blocks, block size and the rest, as labels.",
                    (
                        Query(
                            "max by (instance, engine, num_gpu_blocks, block_size, cache_dtype, "
                            f"enable_prefix_caching) (vllm:cache_config_info{{{TARGETS}}})"
                        ),
                    ),
                    kind="table",
                ),
            ),
        ),
    ),
)

GATEWAY = Dashboard(
    "himap-gateway",
    "HiMAP gateway",
    "Who sends requests, who is refused and why, what images cost, and how much time the gateway "
    "adds before vLLM's handler begins. Limits are per API key, **and per replica** without "
    "`--limits-storage`.",
    (
        Row(
            "Now",
            (
                Panel(
                    "In flight",
                    "Requests in progress.",
                    (Query(f"sum({value('himap_requests_in_flight')})"),),
                    "short",
                    "stat",
                    3,
                ),
                Panel(
                    "Without a valid key",
                    "Requests answered with 401. Without API keys this is 0.",
                    (
                        Query(
                            rate("himap_refused_requests_total", 'reason="key"') + " or vector(0)"
                        ),
                    ),
                    "reqps",
                    "stat",
                    3,
                ),
                Panel(
                    "Over a key's limits",
                    "Requests answered with 429.",
                    (
                        Query(
                            rate("himap_refused_requests_total", 'reason=~"rate|concurrency"')
                            + " or vector(0)"
                        ),
                    ),
                    "reqps",
                    "stat",
                    3,
                ),
                Panel(
                    "Overhead, p95",
                    "Time from a request's last byte to vLLM's handler, without fetching images.",
                    (Query(quantile(0.95, "himap_gateway_overhead_seconds")),),
                    "s",
                    "stat",
                    3,
                    (0.1, 1),
                ),
                Panel(
                    "Image fetch, p95",
                    "Time to fetch all images of a request.",
                    (Query(quantile(0.95, "himap_image_fetch_seconds")),),
                    "s",
                    "stat",
                    4,
                    (2.5, 10),
                ),
                Panel(
                    "Failed readings of the key file",
                    "Failures since the process started. If there are any, look at the log.",
                    (Query(f"sum(himap_api_key_file_errors_total{{{TARGETS}}})"),),
                    "short",
                    "stat",
                    4,
                    (1, 2),
                ),
                Panel(
                    "Requests without shared limits",
                    "For which `--limits-storage` did not answer, since the process started.",
                    (Query(f"sum(himap_limits_storage_errors_total{{{TARGETS}}})"),),
                    "short",
                    "stat",
                    4,
                    (1, 100),
                ),
            ),
        ),
        Row(
            "Clients and refusals",
            (
                Panel(
                    "Requests by route",
                    "`unknown`: refused before routing, or no such route.",
                    (Query(rate("himap_http_requests_total", by=["route"]), "{{route}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Requests by key",
                    "By the key's name. It is empty if the gateway is open or the key was refused.",
                    (Query(rate("himap_http_requests_total", by=["key"]), "key {{key}}"),),
                    "reqps",
                    stacked=True,
                ),
                _REFUSED,
            ),
        ),
        Row(
            "Images",
            (
                Panel(
                    "Images",
                    "Images that reached the engine.",
                    (Query(rate("himap_images_total"), "images"),),
                    "ops",
                    width=6,
                ),
                Panel(
                    "Time to fetch",
                    "Time to fetch a request's images from their hosts. Data URLs take none.",
                    quantiles("himap_image_fetch_seconds"),
                    "s",
                    width=6,
                ),
                Panel(
                    "Time to decode",
                    "Time to decode a request's images into pixels, the sum over the images.",
                    quantiles("himap_image_decode_seconds"),
                    "s",
                    width=6,
                ),
                Panel(
                    "Refused images",
                    "By reason. `image_host`: the address is not public, and --image-hosts does "
                    "not allow it.",
                    (
                        Query(
                            rate(
                                "himap_refused_requests_total",
                                'reason=~"image.*|media|placeholder"',
                                ["reason"],
                            ),
                            "{{reason}}",
                        ),
                    ),
                    "reqps",
                    width=6,
                    stacked=True,
                ),
            ),
        ),
        Row(
            "What the gateway adds",
            (
                Panel(
                    "Overhead",
                    "Time from a request's last byte to vLLM's handler, without fetching images.",
                    pruned_and_not("himap_gateway_overhead_seconds", [0.5, 0.95]),
                    "s",
                ),
                Panel(
                    "Overhead, share of the answer's time",
                    "Sum of the overhead divided by the sum of the answers' time.",
                    (
                        Query(
                            ratio(
                                rate("himap_gateway_overhead_seconds_sum"),
                                rate("himap_e2e_request_latency_seconds_sum"),
                            ),
                            "overhead",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Waiting for the engine's scheduler",
                    "Time that a request waits in the engine's queue.",
                    pruned_and_not("himap_request_queue_time_seconds", [0.5, 0.95]),
                    "s",
                ),
            ),
        ),
        Row(
            "Process",
            (
                Panel(
                    "Memory",
                    "Memory of the gateway's process. The engine and its workers have their own "
                    "processes.",
                    (Query(f"process_resident_memory_bytes{{{TARGETS}}}", "{{instance}}"),),
                    "bytes",
                ),
                Panel(
                    "CPU",
                    "Cores used by the gateway's process.",
                    (
                        Query(
                            f"rate(process_cpu_seconds_total{{{TARGETS}}}[$__rate_interval])",
                            "{{instance}}",
                        ),
                    ),
                ),
                Panel(
                    "Up since",
                    "A restart shows as a drop.",
                    (Query(f"time() - process_start_time_seconds{{{TARGETS}}}", "{{instance}}"),),
                    "s",
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, SAVINGS, ENGINE, GATEWAY)
