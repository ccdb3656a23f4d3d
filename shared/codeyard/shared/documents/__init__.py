"""Small documents of tenants that processes pass on to each other: files, batches."""
