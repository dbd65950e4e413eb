"""The HTTP face: routes, upload parsing, growing files, errors as JSON, and the OpenAPI document.

What crosses the wire is `batchery.wire`'s, what lasts is `batchery.store`'s; here one is turned into the other. Nothing
here runs a request of a batch: it only tells the worker that there is work.
"""
