//! A stock Envoy as the client, in both protocol variants.
