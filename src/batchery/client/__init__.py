"""The client: the raw calls to a batch server (`http`), and the job that goes from upload to results (`job`).

It speaks HTTP to any server that speaks OpenAI's batch API, and knows nothing of how batchery's own is made.
"""
