"""The `codeyard` command: where producer and worker meet. Each command imports what it needs when it runs."""
