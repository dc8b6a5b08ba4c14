//! `windlass certs`: a certificate authority and node certificates, for people without cert-manager.
//!
//! Invariant: a key is readable by its owner only from its first byte on, an existing CA key is never overwritten, and
//! a file appears whole or not at all, for a running daemon re-reads its files when they change.

use std::fs::{self, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Subcommand, value_parser};
use serde_json::json;

use super::kubernetes::{ApiServer, CallError};
use crate::transport::tls::{Authority, PeerName};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the certificate authority of a cluster: ca.crt and ca.key
    Init(Init),
    /// Sign a certificate for one node: ca.crt, tls.crt and tls.key
    Issue(Issue),
}

#[derive(Debug, clap::Args)]
struct Init {
    /// Directory to write to; made if it is missing
    #[arg(long, value_name = "DIR", required_unless_present = "secret")]
    dir: Option<PathBuf>,
    /// Inside a pod: make this Secret instead, with tls.crt and tls.key, unless it is there
    #[arg(long, value_name = "NAMESPACE/NAME", conflicts_with = "dir")]
    secret: Option<SecretName>,
    /// Name of the cluster, as in `node.cluster`
    #[arg(long, value_name = "NAME", default_value = "windlass")]
    cluster: String,
    /// Days until it ends
    #[arg(long, default_value_t = 3650, value_parser = value_parser!(u64).range(1..=36500))]
    days: u64,
}

#[derive(Debug, clap::Args)]
struct Issue {
    /// Directory with ca.crt and ca.key
    #[arg(long, value_name = "DIR")]
    ca: PathBuf,
    /// Name of the node, as in `node.name`
    #[arg(long, value_name = "NAME")]
    node: String,
    /// Name of the cluster, as in `node.cluster`; a node takes no certificate of another
    #[arg(long, value_name = "NAME")]
    cluster: String,
    /// Directory to write to; made if it is missing
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Days until it ends
    #[arg(long, default_value_t = 365, value_parser = value_parser!(u64).range(1..=36500))]
    days: u64,
}

const PUBLIC: u32 = 0o644;
const SECRET: u32 = 0o600;

pub(super) async fn run(args: &Args) -> anyhow::Result<()> {
    match &args.command {
        Command::Init(Init { secret: Some(secret), cluster, days, .. }) => {
            init_secret(secret, cluster, *days).await
        }
        Command::Init(Init { dir: Some(dir), cluster, days, .. }) => init(dir, cluster, *days),
        Command::Init(_) => bail!("give --dir or --secret"),
        Command::Issue(args) => issue(args),
    }
}

/// A Secret's namespace and name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct SecretName {
    namespace: String,
    name: String,
}

impl FromStr for SecretName {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self { namespace: namespace.to_owned(), name: name.to_owned() })
            }
            _ => Err("write it as NAMESPACE/NAME"),
        }
    }
}

/// Makes the authority where every pod can mount it; the key is never on a disk of ours. Needs `create` on secrets.
async fn init_secret(secret: &SecretName, cluster: &str, valid_days: u64) -> anyhow::Result<()> {
    let server = ApiServer::in_cluster("--secret", |name| std::env::var(name).ok())?;
    let (_, issued) = Authority::create(cluster, days(valid_days))?;
    let object = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": { "name": secret.name, "namespace": secret.namespace },
        "stringData": { "tls.crt": issued.certificate_pem, "tls.key": issued.key_pem },
    });
    let SecretName { namespace, name } = secret;
    match server.post(&format!("/api/v1/namespaces/{namespace}/secrets"), &object).await {
        Ok(_) => eprintln!("made the Secret {namespace}/{name}"),
        // Every node depends on it: it is never replaced.
        Err(CallError::Conflict) => eprintln!("the Secret {namespace}/{name} is there already"),
        Err(error) => return Err(error).context("cannot make the Secret"),
    }
    Ok(())
}

fn init(dir: &Path, cluster: &str, valid_days: u64) -> anyhow::Result<()> {
    let (certificate, key) = (dir.join("ca.crt"), dir.join("ca.key"));
    for path in [&certificate, &key] {
        if path.exists() {
            bail!(
                "{} exists; every node of the cluster depends on it. Choose another --dir, or remove it yourself",
                path.display()
            );
        }
    }
    let (_, issued) = Authority::create(cluster, days(valid_days))?;
    make_directory(dir)?;
    write(&key, SECRET, &issued.key_pem)?;
    write(&certificate, PUBLIC, &issued.certificate_pem)?;
    eprintln!(
        "wrote {} and {}; keep the key off the nodes, and sign for each of them with\n  \
         windlass certs issue --ca {} --cluster {cluster} --node NAME --out DIR",
        certificate.display(),
        key.display(),
        dir.display(),
    );
    Ok(())
}

fn issue(args: &Issue) -> anyhow::Result<()> {
    let name = PeerName::new(&args.cluster, &args.node)?;
    let read = |file: &str| {
        let path = args.ca.join(file);
        fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}; `windlass certs init` makes it", path.display()))
    };
    let authority = Authority::from_pem(&read("ca.crt")?, &read("ca.key")?)?;
    let issued = authority.issue(&name, days(args.days))?;
    make_directory(&args.out)?;
    write(&args.out.join("ca.crt"), PUBLIC, authority.certificate_pem())?;
    write(&args.out.join("tls.key"), SECRET, &issued.key_pem)?;
    write(&args.out.join("tls.crt"), PUBLIC, &issued.certificate_pem)?;
    eprintln!("wrote ca.crt, tls.crt and tls.key of {} to {}", name.uri(), args.out.display());
    Ok(())
}

const fn days(days: u64) -> Duration {
    Duration::from_secs(days * 24 * 60 * 60)
}

fn make_directory(path: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make the directory {}", path.display()))
}

/// Writes beside `path` and renames.
fn write(path: &Path, mode: u32, text: &str) -> anyhow::Result<()> {
    let written = || {
        let temporary = path.with_added_extension("new");
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        // The file may be left over from a run that was killed, with another mode.
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    written().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::tls::{Files, Identity};

    fn init_in(dir: &Path) -> anyhow::Result<()> {
        init(dir, "c1", 2)
    }

    #[test]
    fn what_is_issued_is_what_a_node_loads() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let (ca, out) = (scratch.path().join("ca"), scratch.path().join("node"));
        init_in(&ca).expect("makes a CA");
        let args =
            Issue { ca: ca.clone(), node: "gpu-1".into(), cluster: "c1".into(), out: out.clone(), days: 1 };
        issue(&args).expect("signs");
        issue(&args).expect("signs again over the old one");
        let files =
            Files { ca: out.join("ca.crt"), certificate: out.join("tls.crt"), key: out.join("tls.key") };
        Identity::load(files, "c1").expect("a node can use it");
        for key in [ca.join("ca.key"), out.join("tls.key")] {
            let mode = fs::metadata(&key).expect("it exists").permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{}", key.display());
        }
    }

    #[test]
    fn a_secret_is_named_with_its_namespace() {
        let secret: SecretName = "windlass/windlass-ca".parse().expect("a name");
        assert_eq!((secret.namespace.as_str(), secret.name.as_str()), ("windlass", "windlass-ca"));
        for wrong in ["windlass-ca", "/windlass-ca", "windlass/", "a/b/c"] {
            assert!(wrong.parse::<SecretName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_ca_is_never_overwritten_and_a_missing_one_is_named() {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        init_in(scratch.path()).expect("makes a CA");
        let error = init_in(scratch.path()).expect_err("it exists").to_string();
        assert!(error.contains("ca.crt exists"), "{error}");
        let nowhere = scratch.path().join("nowhere");
        let args = Issue {
            ca: nowhere,
            node: "n".into(),
            cluster: "c1".into(),
            out: scratch.path().into(),
            days: 1,
        };
        let error = issue(&args).expect_err("no CA there").to_string();
        assert!(error.contains("windlass certs init"), "{error}");
    }
}
