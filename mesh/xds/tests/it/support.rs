//! A proxy and a control plane joined by queues instead of a network.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serin_xds::client::state::{ClientState, Receipt};
use serin_xds::pb::envoy::config::core::v3::Node;
use serin_xds::pb::envoy::config::route::v3::VirtualHost;
use serin_xds::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource,
};
use serin_xds::pb::google::protobuf::Any;
use serin_xds::server::connection::Connection;
use serin_xds::server::{Event, Options};
use serin_xds::{Change, Origin, Refusal, Resource, ResourceType};

pub(crate) type Key = (ResourceType, Arc<str>);

/// A resource whose content is `content`; the link's proxy refuses what starts with `bad`.
pub(crate) fn resource(resource_type: ResourceType, name: &str, content: &str) -> Arc<Resource> {
    let message = VirtualHost {
        name: name.into(),
        domains: vec![content.into()],
        ..VirtualHost::default()
    };
    let origins = [Origin {
        object: "VirtualService/default/reviews".into(),
        generation: 1,
    }];
    Arc::new(Resource::new(resource_type, name, &message, origins))
}

/// One stream between a proxy and the control plane, and what both remember.
pub(crate) struct Link {
    pub(crate) client: ClientState,
    pub(crate) server: Connection,
    pub(crate) now: Duration,
    /// The view that the control plane has for this proxy.
    pub(crate) view: BTreeMap<Key, Arc<Resource>>,
    /// What the proxy runs with: name → version.
    pub(crate) running: BTreeMap<Key, Arc<str>>,
    /// What the server believes that the proxy holds, from events alone.
    pub(crate) believed: BTreeMap<Key, Arc<str>>,
    pub(crate) refused: HashMap<Key, Arc<str>>,
    /// Requests that the server takes before it knows the view.
    load_after: Option<usize>,
    to_server: VecDeque<DeltaDiscoveryRequest>,
    to_client: VecDeque<DeltaDiscoveryResponse>,
    unsettled: VecDeque<(Receipt, Vec<Refusal>)>,
    contents: HashMap<Arc<str>, String>,
    /// Every response that was delivered.
    pub(crate) log: Vec<String>,
    /// Names asked for again on this stream, which therefore may be sent again.
    pub(crate) asked_again: Vec<Key>,
}

impl Link {
    pub(crate) fn new() -> Self {
        let mut link = Self {
            client: ClientState::new(Node {
                id: "sidecar~10.0.0.1~a.b~c".into(),
                ..Node::default()
            }),
            server: Connection::new(Options::default()),
            now: Duration::ZERO,
            view: BTreeMap::new(),
            running: BTreeMap::new(),
            believed: BTreeMap::new(),
            refused: HashMap::new(),
            load_after: None,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            unsettled: VecDeque::new(),
            contents: HashMap::new(),
            log: Vec::new(),
            asked_again: Vec::new(),
        };
        link.reconnect(0);
        link
    }

    /// The stream breaks: what was under way is lost. A new one begins, on a server that knows only the view, and that
    /// only after some requests.
    pub(crate) fn reconnect(&mut self, load_after: usize) {
        self.to_server.clear();
        self.to_client.clear();
        self.asked_again.clear();
        // The client settles what its consumer had in hand before it states what it holds.
        while let Some((receipt, refusals)) = self.unsettled.pop_front() {
            self.client.settle_delta(&receipt, refusals);
        }
        self.server = Connection::new(Options::default());
        self.believed.clear();
        self.refused.clear();
        self.client.connected();
        self.ask();
        self.load_after = Some(load_after);
        self.load_if_due();
    }

    fn load_if_due(&mut self) {
        if self.load_after == Some(0) {
            self.load_after = None;
            let view: Vec<_> = self.view.values().cloned().collect();
            self.server.load(view);
        }
        self.pump();
    }

    pub(crate) fn ask(&mut self) {
        while let Some(request) = self.client.next_delta_request() {
            self.to_server.push_back(request);
        }
    }

    /// Changes the view by one transaction.
    pub(crate) fn apply(&mut self, changes: Vec<Change>) {
        for change in &changes {
            let key = (change.resource_type(), change.name().clone());
            match change {
                Change::Upsert(resource) => {
                    let message: VirtualHost = prost_decode(&resource.body);
                    self.contents
                        .insert(resource.version.clone(), message.domains[0].clone());
                    self.view.insert(key, resource.clone());
                }
                Change::Remove(..) => {
                    self.view.remove(&key);
                }
            }
        }
        if self.load_after.is_none() {
            self.server.apply(changes);
        }
        self.pump();
    }

    fn pump(&mut self) {
        while let Some(response) = self.server.poll(self.now) {
            let type_url = response.resource_type.type_url();
            self.to_client.push_back(DeltaDiscoveryResponse {
                resources: response
                    .upserted
                    .iter()
                    .map(|resource| WireResource {
                        name: resource.name.to_string(),
                        version: resource.version.to_string(),
                        resource: Some(Any {
                            type_url: type_url.into(),
                            value: resource.body.to_vec(),
                        }),
                        ..WireResource::default()
                    })
                    .collect(),
                removed_resources: response.removed.iter().map(ToString::to_string).collect(),
                type_url: type_url.into(),
                nonce: response.nonce.to_string(),
                ..DeltaDiscoveryResponse::default()
            });
        }
        for event in self.server.take_events() {
            match event {
                Event::Held(resource) => {
                    let key = (resource.resource_type, resource.name.clone());
                    self.believed.insert(key.clone(), resource.version.clone());
                    self.refused.remove(&key);
                }
                Event::Gone(resource_type, name) => {
                    self.believed.remove(&(resource_type, name));
                }
                Event::Refused(resource, _) => {
                    self.refused.insert(
                        (resource.resource_type, resource.name.clone()),
                        resource.version.clone(),
                    );
                }
                Event::Wanted(_) | Event::Unwanted(..) | Event::Sent(_) => {}
            }
        }
    }

    /// The next request reaches the server.
    pub(crate) fn deliver_to_server(&mut self, repeated: bool) -> bool {
        let Some(request) = self.to_server.pop_front() else {
            let waits = self.load_after.is_some();
            // Nothing more comes: the view arrives now.
            self.load_after = self.load_after.map(|_| 0);
            self.load_if_due();
            return waits;
        };
        self.load_after = self.load_after.map(|left| left.saturating_sub(1));
        receive(&mut self.server, &request);
        // An answer that arrives twice, as a stale one does, must change nothing.
        if repeated && !request.response_nonce.is_empty() {
            receive(&mut self.server, &request);
        }
        self.load_if_due();
        true
    }

    /// The next response reaches the client, and its consumer judges it.
    pub(crate) fn deliver_to_client(&mut self, repeated: bool) -> bool {
        let Some(response) = self.to_client.pop_front() else {
            return false;
        };
        if repeated {
            self.take(response.clone());
        }
        self.take(response);
        true
    }

    fn take(&mut self, response: DeltaDiscoveryResponse) {
        let mut names: Vec<_> = response
            .resources
            .iter()
            .map(|resource| resource.name.as_str())
            .collect();
        names.extend(response.removed_resources.iter().map(String::as_str));
        self.log.push(format!(
            "{} {}",
            response.type_url.rsplit('.').next().unwrap(),
            names.join(" ")
        ));
        let (incoming, receipt) = self
            .client
            .receive_delta(response)
            .expect("a response of a subscribed type");
        let mut refusals = Vec::new();
        for one in incoming.upserted {
            let content = &self.contents[&one.version];
            if content.starts_with("bad") {
                refusals.push(Refusal::new(one.name, format!("content {content}")));
            } else {
                self.running
                    .insert((receipt.resource_type, one.name), one.version);
            }
        }
        for name in incoming.removed {
            self.running.remove(&(receipt.resource_type, name));
        }
        self.unsettled.push_back((receipt, refusals));
    }

    /// The consumer's oldest verdict goes back.
    pub(crate) fn settle(&mut self) -> bool {
        let Some((receipt, refusals)) = self.unsettled.pop_front() else {
            return false;
        };
        let request = self.client.settle_delta(&receipt, refusals);
        self.to_server.push_back(request);
        true
    }

    /// Lets everything arrive, letting time pass where something waits for it.
    pub(crate) fn quiesce(&mut self) {
        for _ in 0..100_000 {
            self.ask();
            if self.deliver_to_server(false) || self.deliver_to_client(false) || self.settle() {
                continue;
            }
            match self.server.deadline() {
                Some(deadline) => {
                    self.now = self.now.max(deadline);
                    self.pump();
                }
                None => return,
            }
        }
        panic!(
            "never quiet: {:?}",
            self.log.iter().rev().take(20).collect::<Vec<_>>()
        );
    }

    /// The proxy's interest changes; what it no longer wants it stops running, and so it does with names that it gives up
    /// while everything is wanted: these come again.
    pub(crate) fn set_interest(
        &mut self,
        resource_type: ResourceType,
        interest: serin_xds::client::Interest,
    ) {
        let before = self.client.interest(resource_type);
        self.running.retain(|(ty, name), _| {
            let given_up = before.names.contains(name) && !interest.names.contains(name);
            *ty != resource_type || (!given_up && (interest.all || interest.names.contains(name)))
        });
        self.client.set_interest(resource_type, interest);
        self.ask();
    }

    /// Names are given up and wanted again before the server hears of either; what they stand for is run no more.
    pub(crate) fn renew(&mut self, resource_type: ResourceType, names: &[&str]) {
        let mut changes = serin_xds::client::NameChanges::default();
        for name in names {
            self.running.remove(&(resource_type, Arc::from(*name)));
            changes.remove(*name);
            changes.add(*name);
        }
        self.client.change_interest(resource_type, changes);
    }
}

pub(crate) fn prost_decode<M: prost::Message + Default>(bytes: &[u8]) -> M {
    M::decode(bytes).expect("a message that was encoded here")
}

/// What the server's wire adapter does with a request, from the public operations of the connection.
fn receive(server: &mut Connection, request: &DeltaDiscoveryRequest) {
    let resource_type = ResourceType::from_type_url(&request.type_url).expect("a known type");
    if let Ok(nonce) = request.response_nonce.parse() {
        server.answer(
            resource_type,
            nonce,
            request
                .error_detail
                .as_ref()
                .map(|status| status.message.as_str()),
        );
        return;
    }
    let first = !server.has_asked(resource_type);
    let subscribe: Vec<_> = request
        .resource_names_subscribe
        .iter()
        .map(String::as_str)
        .collect();
    let all = subscribe.contains(&"*");
    if first {
        let held = request.initial_resource_versions.iter();
        server.state_held(
            resource_type,
            held.map(|(name, version)| (name.as_str(), version.as_str())),
        );
    }
    server.subscribe(
        resource_type,
        all,
        subscribe.into_iter().filter(|name| *name != "*"),
    );
    let unsubscribe: Vec<_> = request
        .resource_names_unsubscribe
        .iter()
        .map(String::as_str)
        .collect();
    server.unsubscribe(resource_type, unsubscribe.contains(&"*"), unsubscribe);
}
