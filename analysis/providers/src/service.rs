//! What services have in common that are asked with GET for JSON.

use reqwest::Url;
use serde::de::DeserializeOwned;

use crate::credentials::Secret;
use crate::http::{Call, below};
use crate::{Config, Connector, Error};

/// A service with an address, perhaps one that everybody uses, and keys that its Secret must have.
#[derive(Debug)]
pub(crate) struct Service {
    name: &'static str,
    address: String,
    connector: Connector,
    config: Config,
}

impl Service {
    /// Checks what can be checked before anything is asked. Without a usual address the template must have one.
    pub(crate) fn new(
        name: &'static str,
        usual: Option<&'static str>,
        keys: &[&'static str],
        connector: Connector,
        config: &Config,
    ) -> Result<Self, Error> {
        let address = match usual {
            Some(usual) => config.address_or(usual),
            None => config.address(name)?.to_owned(),
        };
        below(name, &address, "")?;
        for key in keys {
            config.secret(name, key)?;
        }
        Ok(Self {
            name,
            address,
            connector,
            config: config.clone(),
        })
    }

    /// A path below the address.
    pub(crate) fn url(&self, path: &str) -> Result<Url, Error> {
        below(self.name, &self.address, path)
    }

    /// A key of the Secret.
    pub(crate) fn secret(&self, key: &'static str) -> Result<&Secret, Error> {
        self.config.secret(self.name, key)
    }

    /// A request with what the template adds to all of them.
    pub(crate) fn get(&self, url: Url) -> Result<Call, Error> {
        Call::get(self.name, url).with_config(&self.config)
    }

    /// Asks.
    pub(crate) async fn json<T: DeserializeOwned>(&self, call: &Call) -> Result<T, Error> {
        self.connector.http.send(call).await?.json(self.name)
    }
}
