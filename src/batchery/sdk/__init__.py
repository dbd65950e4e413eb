"""The client as a library: `Client` and `AsyncClient` run the same jobs as the command does, and the calls of
`AsyncOpenAI` are gathered into batches.

It reads no command line, prints nothing that was not asked for, and never ends the process.
"""
