"""What a tenant may use, counted in the store so that it holds over all gateways."""
