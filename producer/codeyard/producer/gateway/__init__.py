"""The HTTP gateway: native routes over the client. Stateless: any replica answers for any job.

`serve.run_gateway` is the process; `app.create_app` the ASGI app for whoever serves it otherwise.
"""
