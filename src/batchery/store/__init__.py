"""What is durable: the tables and their queries (one module a table), the blob store, and the line index.

Nothing above this package speaks SQL or knows where a blob lies. The same queries run on SQLite and on PostgreSQL.
"""
