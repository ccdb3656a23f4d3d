"""From a URL to an adapter: the one place that knows which adapters there are.

Adapter libraries are imported only when their URL is used.
"""

from codeyard.shared.access.port import KeyStore
from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.broker.port import Broker
from codeyard.shared.documents.port import DocumentStore
from codeyard.shared.limits.port import LimitStore
from codeyard.shared.settings import BrokerSettings, StoreSettings
from codeyard.shared.store.port import Store
from codeyard.shared.topology import Topology


async def open_broker(settings: BrokerSettings, topology: Topology) -> Broker:
    """Connect. Raises BrokerUnavailable if there is no server within `publish_timeout_s`, SettingsError
    if the embedded file cannot be used."""
    if settings.url.startswith("sqlite:"):
        from codeyard.shared.broker.sqlite import SqliteBroker

        return await SqliteBroker.open(settings, topology)
    from codeyard.shared.broker.rabbitmq import RabbitBroker

    return await RabbitBroker.open(settings, topology)


async def open_store(settings: StoreSettings, topology: Topology) -> Store:
    """Connect. Raises StoreUnavailable if there is no server within `timeout_s`, SettingsError if the
    embedded file cannot be used."""
    if settings.url.startswith("sqlite:"):
        from codeyard.shared.store.sqlite import SqliteStore

        return await SqliteStore.open(settings, topology)
    from codeyard.shared.store.redis import RedisStore

    return await RedisStore.open(settings, topology)


async def open_keys(settings: StoreSettings, topology: Topology) -> KeyStore:
    """The API keys, where the store is. Raises as open_store."""
    if settings.url.startswith("sqlite:"):
        from codeyard.shared.access.sqlite import SqliteKeyStore

        return await SqliteKeyStore.open(settings, topology)
    from codeyard.shared.access.redis import RedisKeyStore

    return await RedisKeyStore.open(settings, topology)


async def open_limits(settings: StoreSettings, topology: Topology) -> LimitStore:
    """What tenants have used, where the store is. Raises as open_store."""
    if settings.url.startswith("sqlite:"):
        from codeyard.shared.limits.sqlite import SqliteLimitStore

        return await SqliteLimitStore.open(settings, topology)
    from codeyard.shared.limits.redis import RedisLimitStore

    return await RedisLimitStore.open(settings, topology)


async def open_blobs(settings: StoreSettings, topology: Topology) -> BlobStore:
    """Long prompts and files, where the store is. Raises as open_store."""
    if settings.url.startswith("sqlite:"):
        from codeyard.shared.blobs.sqlite import SqliteBlobStore

        return await SqliteBlobStore.open(settings, topology)
    from codeyard.shared.blobs.redis import RedisBlobStore

    return await RedisBlobStore.open(settings, topology)


async def open_documents(settings: StoreSettings, topology: Topology) -> DocumentStore:
    """What gateways keep of files and batches, where the store is. Raises as open_store."""
    if settings.url.startswith("sqlite:"):
        from codeyard.shared.documents.sqlite import SqliteDocumentStore

        return await SqliteDocumentStore.open(settings, topology)
    from codeyard.shared.documents.redis import RedisDocumentStore

    return await RedisDocumentStore.open(settings, topology)
