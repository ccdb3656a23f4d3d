"""The HTTP gateway: native routes over the clients. Stateless: any replica answers for any job."""
