//! The example applications, one program: Istio's bookinfo (productpage, details, reviews, ratings) and a service
//! like podinfo.
//!
//! They are what the demo and the end-to-end tests deliver. Ports, paths, headers and bodies follow the originals, so
//! that their manifests run unchanged; what an application does is set by its environment, as in the originals.
//! Not for production: no database, no templates, no authentication.

mod bookinfo;
mod podcli;
mod podinfo;
mod serve;

use clap::{Parser, Subcommand};

/// Example applications for Serin.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    application: Application,
}

#[derive(Debug, Subcommand)]
enum Application {
    /// bookinfo's front page; calls details and reviews
    Productpage(bookinfo::Port),
    /// bookinfo's details of a book
    Details(bookinfo::Port),
    /// bookinfo's reviews; v2 and v3 call ratings
    Reviews(bookinfo::Port),
    /// bookinfo's ratings
    Ratings(bookinfo::Port),
    /// A service like podinfo, with error and latency knobs
    Podinfo(podinfo::Options),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    match Arguments::parse().application {
        Application::Productpage(port) => {
            serve::run(
                port.port,
                bookinfo::productpage::router(&bookinfo::Environment::read()),
            )
            .await
        }
        Application::Details(port) => serve::run(port.port, bookinfo::details::router()).await,
        Application::Reviews(port) => {
            serve::run(
                port.port,
                bookinfo::reviews::router(&bookinfo::Environment::read()),
            )
            .await
        }
        Application::Ratings(port) => {
            serve::run(
                port.port,
                bookinfo::ratings::router(&bookinfo::Environment::read()),
            )
            .await
        }
        Application::Podinfo(options) => podinfo::run(options).await,
    }
}
