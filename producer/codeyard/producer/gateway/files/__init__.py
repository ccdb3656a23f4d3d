"""Files that tenants upload, in OpenAI's API: input of batches, and what comes out of them."""
