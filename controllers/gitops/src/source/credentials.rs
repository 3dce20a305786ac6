//! How a git server is addressed and convinced: the URL, and the keys of the Secrets that an object names.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

/// A value that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Redacted(pub(crate) String);

impl fmt::Debug for Redacted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Where a repository is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// On this machine.
    Local(PathBuf),
    /// Behind http or https.
    Http { url: String, host: String, tls: bool },
    /// Behind ssh.
    Ssh {
        url: String,
        host: String,
        port: u16,
        user: String,
    },
}

impl Place {
    /// Reads `spec.url`. Local paths are only honoured when `local_allowed` (standalone).
    pub(crate) fn parse(url: &str, local_allowed: bool) -> Result<Self, String> {
        let local = url
            .strip_prefix("file://")
            .or_else(|| url.starts_with('/').then_some(url));
        if let Some(path) = local {
            if !local_allowed {
                return Err(format!(
                    "spec.url '{url}' is a path of the machine that the controller runs on; that is honoured in standalone only, use http, https or ssh"
                ));
            }
            if !path.starts_with('/') {
                return Err(format!(
                    "spec.url '{url}': a file URL has three slashes and an absolute path"
                ));
            }
            return Ok(Self::Local(PathBuf::from(path)));
        }
        let (scheme, rest) = url.split_once("://").ok_or_else(|| {
            format!("spec.url '{url}' has no scheme; write ssh://user@host/path instead of user@host:path")
        })?;
        let authority = rest.split('/').next().unwrap_or_default();
        let (user, host_port) = authority
            .rsplit_once('@')
            .map_or((None, authority), |(u, h)| (Some(u), h));
        let (host, port) = match host_port.strip_prefix('[').and_then(|h| h.split_once(']')) {
            Some((v6, port)) => (v6.to_string(), port.strip_prefix(':')),
            None => host_port
                .rsplit_once(':')
                .map_or((host_port.to_string(), None), |(h, p)| (h.to_string(), Some(p))),
        };
        if host.is_empty() {
            return Err(format!("spec.url '{}' names no host", without_credentials(url)));
        }
        match scheme {
            "http" | "https" => {
                if user.is_some() {
                    return Err(
                        "spec.url carries credentials; move them to a Secret and name it in spec.secretRef"
                            .into(),
                    );
                }
                Ok(Self::Http {
                    url: url.to_string(),
                    host,
                    tls: scheme == "https",
                })
            }
            "ssh" => {
                let port = port
                    .map_or(Ok(22), str::parse)
                    .map_err(|_| format!("spec.url '{url}': the port is not a number"))?;
                let user = user
                    .map_or("git", |u| u.split(':').next().unwrap_or(u))
                    .to_string();
                Ok(Self::Ssh {
                    url: url.to_string(),
                    host,
                    port,
                    user,
                })
            }
            other => Err(format!(
                "spec.url: scheme '{other}' is not supported; use http, https or ssh"
            )),
        }
    }

    /// What libgit2 is given.
    pub(crate) fn url(&self) -> String {
        match self {
            Self::Local(path) => path.to_string_lossy().into_owned(),
            Self::Http { url, .. } | Self::Ssh { url, .. } => url.clone(),
        }
    }

    /// Whose threads an operation takes.
    pub(crate) fn host(&self) -> String {
        match self {
            Self::Local(path) => path.to_string_lossy().into_owned(),
            Self::Http { host, .. } | Self::Ssh { host, .. } => host.clone(),
        }
    }
}

/// A URL as messages show it.
pub(crate) fn without_credentials(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return url.to_string();
    };
    match rest.split_once('@') {
        Some((user, host)) if !user.contains('/') && scheme != "ssh" => format!("{scheme}://{host}"),
        _ => url.to_string(),
    }
}

/// What a Secret holds for a git server.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Auth {
    pub(crate) basic: Option<(String, Redacted)>,
    pub(crate) bearer: Option<Redacted>,
    pub(crate) ssh: Option<SshKey>,
    /// PEM certificates of authorities that the server's certificate may come from.
    pub(crate) ca: Option<String>,
    pub(crate) proxy: Option<Proxy>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SshKey {
    pub(crate) identity: Redacted,
    pub(crate) passphrase: Option<Redacted>,
    pub(crate) known_hosts: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Proxy(pub(crate) Redacted);

/// The keys of a Secret as text.
pub(crate) type Keys = BTreeMap<String, Vec<u8>>;

impl Auth {
    /// Reads the keys of `spec.secretRef` for a place. The error is a sentence and quotes no value.
    pub(crate) fn from_secret(place: &Place, keys: &Keys) -> Result<Self, String> {
        let text = |key: &str| -> Result<Option<String>, String> {
            match keys.get(key) {
                None => Ok(None),
                Some(bytes) if bytes.is_empty() => Ok(None),
                Some(bytes) => String::from_utf8(bytes.clone())
                    .map(Some)
                    .map_err(|_| format!("key '{key}' is not text")),
            }
        };
        let mut auth = Self::default();
        match place {
            Place::Local(_) => {}
            Place::Http { tls, .. } => {
                if keys.contains_key("githubAppID") {
                    return Err(
                        "holds GitHub App keys, which are not honoured yet; use username and password".into(),
                    );
                }
                if keys.contains_key("tls.crt") || keys.contains_key("tls.key") {
                    return Err("holds a client certificate (tls.crt, tls.key), which is not honoured yet; use username and password".into());
                }
                auth.ca = text("ca.crt")?.or(text("caFile")?);
                auth.bearer = text("bearerToken")?.map(Redacted);
                auth.basic = match (text("username")?, text("password")?) {
                    (Some(user), Some(password)) => Some((user, Redacted(password))),
                    (None, None) => None,
                    (Some(_), None) => return Err("has 'username' but no 'password'".into()),
                    (None, Some(_)) => return Err("has 'password' but no 'username'".into()),
                };
                if auth.basic.is_some() && auth.bearer.is_some() {
                    return Err("has both username/password and bearerToken; keep one".into());
                }
                if !tls && (auth.basic.is_some() || auth.bearer.is_some()) {
                    return Err("holds credentials, and spec.url is plain http, which would send them in the clear; use https".into());
                }
            }
            Place::Ssh { .. } => {
                let identity = text("identity")?.ok_or("has no key 'identity' (the private ssh key)")?;
                let known_hosts = text("known_hosts")?
                    .ok_or("has no key 'known_hosts'; without it the server cannot be recognised (ssh-keyscan HOST prints it)")?;
                auth.ssh = Some(SshKey {
                    identity: Redacted(identity),
                    passphrase: text("password")?.map(Redacted),
                    known_hosts,
                });
            }
        }
        Ok(auth)
    }

    /// Reads the keys of `spec.proxySecretRef`.
    pub(crate) fn add_proxy(&mut self, keys: &Keys) -> Result<(), String> {
        let text = |key: &str| keys.get(key).map(|b| String::from_utf8_lossy(b).into_owned());
        let address = text("address").ok_or("has no key 'address'")?;
        let Some((scheme @ ("http" | "https"), rest)) = address.split_once("://") else {
            return Err("'address' is not an http or https URL; socks5 is not honoured".into());
        };
        let url = match (text("username"), text("password")) {
            (Some(user), Some(password)) => {
                format!("{scheme}://{}:{}@{rest}", percent(&user), percent(&password))
            }
            _ => address.clone(),
        };
        self.proxy = Some(Proxy(Redacted(url)));
        Ok(())
    }

    /// Objects with the same URL and the same identity share one cache; others must not, since what one may read
    /// the other may not.
    pub(crate) fn identity(&self, place: &Place) -> String {
        let mut hash = Sha256::new();
        let mut part = |name: &str, value: &str| {
            hash.update((name.len() as u64).to_be_bytes());
            hash.update(name);
            hash.update((value.len() as u64).to_be_bytes());
            hash.update(value);
        };
        part("url", &place.url());
        if let Some((user, password)) = &self.basic {
            part(user, &password.0);
        }
        if let Some(token) = &self.bearer {
            part("bearer", &token.0);
        }
        if let Some(key) = &self.ssh {
            part("ssh", &key.identity.0);
        }
        hex(&hash.finalize())
    }
}

fn percent(text: &str) -> String {
    text.bytes()
        .map(|b| {
            if b.is_ascii_alphanumeric() || b"-._~".contains(&b) {
                (b as char).to_string()
            } else {
                format!("%{b:02X}")
            }
        })
        .collect()
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    bytes
        .iter()
        .flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(pairs: &[(&str, &str)]) -> Keys {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_string(), v.as_bytes().to_vec()))
            .collect()
    }

    #[test]
    fn urls_are_read_into_places_and_bad_ones_are_refused_with_the_remedy() {
        let ssh = Place::parse("ssh://deploy@git.example.com:2222/a/b", false).unwrap();
        assert!(
            matches!(&ssh, Place::Ssh { host, port: 2222, user, .. } if host == "git.example.com" && user == "deploy")
        );
        assert!(matches!(
            Place::parse("https://host/a", false),
            Ok(Place::Http { tls: true, .. })
        ));
        assert_eq!(
            Place::parse("file:///srv/repo", true),
            Ok(Place::Local("/srv/repo".into()))
        );
        for (url, part) in [
            ("git@host:a/b", "ssh://user@host/path"),
            ("https://user:secret@host/a", "spec.secretRef"),
            ("/srv/repo", "standalone only"),
            ("ftp://host/a", "'ftp'"),
            ("https:///a", "names no host"),
        ] {
            let error = Place::parse(url, false).unwrap_err();
            assert!(error.contains(part), "{url}: {error}");
            assert!(!error.contains("secret@"), "{error}");
        }
    }

    #[test]
    fn incomplete_or_dangerous_credentials_are_refused_by_name() {
        let https = Place::parse("https://host/a", false).unwrap();
        let http = Place::parse("http://host/a", false).unwrap();
        let ssh = Place::parse("ssh://git@host/a", false).unwrap();
        let basic = [("username", "u"), ("password", "p")];
        for (place, pairs, part) in [
            (&https, vec![("username", "u")], "no 'password'"),
            (
                &https,
                vec![("username", "u"), ("password", "p"), ("bearerToken", "t")],
                "both",
            ),
            (&http, basic.to_vec(), "plain http"),
            (&ssh, vec![("known_hosts", "h")], "'identity'"),
            (&ssh, vec![("identity", "i")], "'known_hosts'"),
            (&https, vec![("githubAppID", "1")], "GitHub App"),
        ] {
            let error = Auth::from_secret(place, &keys(&pairs)).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let good = Auth::from_secret(&https, &keys(&basic)).unwrap();
        assert!(
            !format!("{good:?}").contains("\"p\""),
            "secrets are never printed"
        );
    }

    #[test]
    fn objects_with_other_credentials_do_not_share_a_cache() {
        let place = Place::parse("https://host/a", false).unwrap();
        let one = Auth::from_secret(&place, &keys(&[("username", "u"), ("password", "p")])).unwrap();
        assert_ne!(one.identity(&place), Auth::default().identity(&place));
    }
}
