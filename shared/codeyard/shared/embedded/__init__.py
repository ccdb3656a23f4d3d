"""One SQLite file that several processes of one machine share: the core under SqliteStore and SqliteBroker.

`file.EmbeddedFile` is what the adapters use; `place` says where it may lie, `schema` what is in it,
`transactions` how calls share commits, `watcher` how waiters learn of them, `liveness` how a killed
process is noticed, `identity` whether it is the file it was, `backup` how it is copied while in use,
`clock` what time it is. Raises only `FileUnavailable` and `SettingsError`.
"""
