"""The settings of SPIRE's server and agents in the lab (HCL; spire v1.13, doc/spire_server.md, doc/spire_agent.md). Times are short, to be seen."""

from pathlib import Path


def server(folder: Path, port: int, *, trust_domain: str, ttl_s: float) -> str:
    """The server below `folder`, where its authorities' certificates lie. `ttl_s`: the life of agents' and workloads' SVIDs."""
    return f"""\
server {{
    bind_address = "127.0.0.1"
    bind_port = "{port}"
    socket_path = "{folder / "server.sock"}"
    data_dir = "{folder / "server"}"
    trust_domain = "{trust_domain}"
    log_level = "INFO"
    ca_ttl = "24h"
    default_x509_svid_ttl = "{ttl_s:.0f}s"
    agent_ttl = "{ttl_s:.0f}s"
    ratelimit {{ attestation = false }}  # all agents have one address here
    experimental {{ cache_reload_interval = "1s" }}
}}
plugins {{
    DataStore "sql" {{
        plugin_data {{
            database_type = "sqlite3"
            connection_string = "{folder / "server.sqlite3"}"
        }}
    }}
    KeyManager "disk" {{
        plugin_data {{ keys_path = "{folder / "server.keys"}" }}
    }}
    UpstreamAuthority "disk" {{
        plugin_data {{
            cert_file_path = "{folder / "root.pem"}"
            key_file_path = "{folder / "root.key"}"
        }}
    }}
    NodeAttestor "tpm_devid" {{
        plugin_data {{
            devid_ca_path = "{folder / "devid-ca.pem"}"
            endorsement_ca_path = "{folder / "endorsement.pem"}"
        }}
    }}
    NodeAttestor "x509pop" {{
        plugin_data {{ ca_bundle_path = "{folder / "machines.pem"}" }}
    }}
}}
"""


def agent(home: Path, socket: Path, port: int, *, bundle: Path, trust_domain: str, attestor: str) -> str:
    """An agent that serves its Workload API on `socket`."""
    return f"""\
agent {{
    server_address = "127.0.0.1"
    server_port = "{port}"
    socket_path = "{socket}"
    data_dir = "{home}"
    trust_domain = "{trust_domain}"
    trust_bundle_path = "{bundle}"
    log_level = "INFO"
    experimental {{ sync_interval = "2s" }}
}}
plugins {{
    KeyManager "memory" {{
        plugin_data {{}}
    }}
    WorkloadAttestor "unix" {{
        plugin_data {{}}
    }}
{attestor}}}
"""


def x509pop(key: str, certificate: str) -> str:
    """Attestation by a certificate of the machine's."""
    return f"""\
    NodeAttestor "x509pop" {{
        plugin_data {{
            private_key_path = "{key}"
            certificate_path = "{certificate}"
        }}
    }}
"""


def tpm_devid(tpm: str, private: str, public: str, certificate: str) -> str:
    """Attestation by a DevID key in the TPM behind a Unix socket."""
    return f"""\
    NodeAttestor "tpm_devid" {{
        plugin_data {{
            tpm_device_path = "{tpm}"
            devid_priv_path = "{private}"
            devid_pub_path = "{public}"
            devid_cert_path = "{certificate}"
        }}
    }}
"""
