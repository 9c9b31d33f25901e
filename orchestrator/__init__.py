"""Weft's orchestrator: decides where agents' requests run and where their KV cache lives.

Floors, from the bottom; imports go down, never up, and never between `live` and a simulator:

    core/   every decision, pure: `handle(event, now) -> [Command]`
    wire/   the core's nouns as bytes: protobuf stubs and their codec
    live/   drives the core in real time: HTTP gateway, links to nodes, Ray fleet, metrics
"""
