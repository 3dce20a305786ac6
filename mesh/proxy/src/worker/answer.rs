//! What routes answer themselves: redirects, direct responses, and that there is nobody.

use http::request::Parts;
use http::{HeaderValue, Response, StatusCode, header};

use super::exchange::Exchange;
use super::filters;
use super::local::{Body, LocalReply};
use super::logging;
use super::prepare::{rewritten_target, set_target};
use super::request::{Routed, view};
use super::scene::ResponseScene;
use crate::config::route::{Action, Redirect, Route};
use crate::metrics::events::HttpEvent;
use crate::metrics::flags::Flags;

/// Answers a request whose route does not forward it.
pub(super) fn answer(mut exchange: Box<Exchange>, routed: &Routed, parts: &mut Parts) -> Response<Body> {
    let conn = exchange.conn.clone();
    match &routed.route.action {
        Action::Direct(direct) => {
            conn.note(HttpEvent::DirectResponse);
            logging::keep_sent(&mut exchange, parts);
            let mut reply = LocalReply::new(direct.status, Flags::default(), "direct_response", "");
            reply.body = direct.body.clone();
            if direct.status == StatusCode::CREATED || direct.status.is_redirection() {
                // Envoy: the request's own address, unless the route sets another.
                let target = parts.uri.path_and_query().map_or("/", |path| path.as_str());
                let location = Route::location(None, &view(parts), target);
                return located(exchange, routed, parts, reply, &location);
            }
            finish(exchange, routed, parts, reply)
        }
        Action::Redirect(redirect) => {
            conn.note(HttpEvent::DirectResponse);
            let location = follow(&mut exchange, routed, redirect, parts);
            logging::keep_sent(&mut exchange, parts);
            let reply = LocalReply::new(redirect.status, Flags::default(), "direct_response", "");
            located(exchange, routed, parts, reply, &location)
        }
        Action::Tls => {
            conn.note(HttpEvent::DirectResponse);
            logging::keep_sent(&mut exchange, parts);
            let location = format!("https://{}{}", view(parts).authority(), parts.uri);
            let reply = LocalReply::new(
                StatusCode::MOVED_PERMANENTLY,
                Flags::default(),
                "direct_response",
                "",
            );
            located(exchange, routed, parts, reply, &location)
        }
        Action::Nobody | Action::Forward(_) => {
            conn.note(HttpEvent::NoRoute);
            logging::keep_sent(&mut exchange, parts);
            LocalReply::new(StatusCode::NOT_FOUND, Flags::NO_ROUTE, "route_not_found", "").send(exchange)
        }
    }
}

/// Does to a request what the redirect says, and tells where it leads.
fn follow(exchange: &mut Exchange, routed: &Routed, redirect: &Redirect, parts: &mut Parts) -> String {
    let conn = exchange.conn.clone();
    let rewritten = redirect
        .rewrite()
        .and_then(|rewrite| rewritten_target(&conn.manager.router, &routed.route, rewrite, parts));
    let Some(target) = rewritten else {
        let target = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        return Route::location(Some(redirect), &view(parts), target);
    };
    let location = Route::location(Some(redirect), &view(parts), &target);
    // What is no path leads nowhere, and does not become the path of this request.
    set_target(parts, &target);
    filters::keep_request(exchange, parts);
    location
}

fn located(
    exchange: Box<Exchange>,
    routed: &Routed,
    parts: &Parts,
    mut reply: LocalReply,
    location: &str,
) -> Response<Body> {
    let Ok(location) = HeaderValue::from_str(location) else {
        return LocalReply::new(
            StatusCode::BAD_REQUEST,
            Flags::DOWNSTREAM_PROTOCOL_ERROR,
            "invalid_path",
            "",
        )
        .send(exchange);
    };
    reply.headers.insert(header::LOCATION, location);
    finish(exchange, routed, parts, reply)
}

fn finish(
    mut exchange: Box<Exchange>,
    routed: &Routed,
    parts: &Parts,
    mut reply: LocalReply,
) -> Response<Body> {
    reply.foretell(&mut exchange);
    routed.mutate_response(&mut reply.headers, None, &ResponseScene::of(&exchange, parts));
    reply.send(exchange)
}
