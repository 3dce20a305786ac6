#!/usr/bin/env python3
"""Writes mesh/proxy/src/bootstrap/schema.txt: names, numbers and types of the fields that a bootstrap file may hold.

Read from the .proto files that the crate envoy-types carries (its generated code has no descriptors). Run it after
envoy-types was updated:  hack/envoy-schema.py [path to the crate]

One line a message:   m <full name> <field>:<number>:<type>[|<oneof>] ...
One line an enum:     e <full name> <value>:<number> ...
Types: a letter for a scalar, `M<line>` for a message, `E<line>` for an enum (lines count from 0, of either kind);
`*` before it for a list, `%<key>=` for a map.
"""

import glob
import os
import re
import sys

SCALARS = {
    "double": "d", "float": "f", "int32": "i", "int64": "l", "uint32": "u", "uint64": "U", "sint32": "z",
    "sint64": "Z", "fixed32": "x", "fixed64": "X", "sfixed32": "w", "sfixed64": "W", "bool": "b", "string": "t",
    "bytes": "y",
}
# What a file may hold: the bootstrap itself, and every message that an Any within may be.
ROOTS = ["envoy.config.bootstrap.v3.Bootstrap", "envoy.service.discovery.v3.DiscoveryResponse",
         "envoy.extensions.transport_sockets.tls.v3.Secret", "envoy.config.endpoint.v3.ClusterLoadAssignment",
         "envoy.config.route.v3.RouteConfiguration", "envoy.config.route.v3.FilterConfig",
         "envoy.config.trace.v3.ZipkinConfig", "envoy.config.trace.v3.OpenTelemetryConfig",
         "envoy.config.trace.v3.DatadogConfig", "envoy.config.core.v3.TypedExtensionConfig",
         "envoy.service.runtime.v3.Runtime", "xds.type.v3.TypedStruct", "envoy.admin.v3.TapRequest",
         "envoy.config.rbac.v3.Action", "envoy.type.matcher.v3.HttpRequestHeaderMatchInput",
         "envoy.type.matcher.v3.HttpRequestQueryParamMatchInput", "xds.type.matcher.v3.CelMatcher",
         "xds.type.matcher.v3.HttpAttributesCelMatchInput", "xds.type.matcher.v3.IPMatcher"]
EXTENSIONS = ["access_loggers", "compression.brotli", "compression.gzip", "compression.zstd", "filters.http",
              "filters.listener", "filters.network", "formatter", "http.early_header_mutation.header_mutation",
              "http.header_validators", "http.original_ip_detection",
              "internal_redirect", "load_balancing_policies", "network", "path", "rbac", "request_id",
              "resource_monitors", "retry", "transport_sockets", "upstreams", "matching", "tracers", "health_checkers"]
# What Istio's control plane sends beside Envoy's own types, and the matchers that the crate leaves out: (field, number,
# prefix, type).
FOREIGN = {
    "xds.type.matcher.v3.CelMatcher": [("expr_match", 1, "", "xds.type.v3.CelExpression"), ("description", 2, "", "string")],
    "xds.type.matcher.v3.HttpAttributesCelMatchInput": [],
    "xds.type.matcher.v3.IPMatcher": [("range_matchers", 1, "*", "xds.type.matcher.v3.IPMatcher.IPRangeMatcher")],
    "xds.type.matcher.v3.IPMatcher.IPRangeMatcher": [
        ("ranges", 1, "*", "xds.core.v3.CidrRange"), ("on_match", 2, "", "xds.type.matcher.v3.Matcher.OnMatch"),
        ("exclusive", 3, "", "bool")],
    "udpa.type.v1.TypedStruct": [("type_url", 1, "", "string"), ("value", 2, "", "google.protobuf.Struct")],
    "stats.PluginConfig": [
        ("disable_host_header_fallback", 6, "", "bool"), ("tcp_reporting_duration", 7, "", "google.protobuf.Duration"),
        ("metrics", 8, "*", "stats.MetricConfig"), ("definitions", 9, "*", "stats.MetricDefinition"),
        ("reporter", 10, "", "stats.Reporter"), ("rotation_interval", 11, "", "google.protobuf.Duration"),
        ("graceful_deletion_interval", 12, "", "google.protobuf.Duration")],
    "stats.MetricConfig": [
        ("dimensions", 1, "%t=", "string"), ("name", 2, "", "string"), ("tags_to_remove", 3, "*", "string"),
        ("match", 4, "", "string"), ("drop", 5, "", "bool")],
    "stats.MetricDefinition": [("name", 1, "", "string"), ("value", 2, "", "string"), ("type", 3, "", "stats.MetricType")],
    "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig": [
        ("alpn_override", 1, "*", "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig.AlpnOverride")],
    "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig.AlpnOverride": [
        ("upstream_protocol", 1, "", "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig.Protocol"),
        ("alpn_override", 2, "*", "string")],
}
FOREIGN_ENUMS = {
    "stats.Reporter": [("UNSPECIFIED", 0), ("SERVER_GATEWAY", 1)],
    "stats.MetricType": [("COUNTER", 0), ("GAUGE", 1), ("HISTOGRAM", 2)],
    "istio.envoy.config.filter.http.alpn.v2alpha1.FilterConfig.Protocol": [("HTTP10", 0), ("HTTP11", 1), ("HTTP2", 2)],
}
# Large, and nothing here will ever know them.
LEFT_OUT = re.compile(r"dubbo|thrift|redis|mongo|zookeeper|\.wasm|golang|\.lua|kafka|generic_proxy|postgres|mcp|"
                      r"aws_|gcp_|oauth2|credential_injector|quic|dynamic_modules|reverse_|sip|rocketmq|"
                      r"stateful|dynamic_forward_proxy|grpc_json|proto_|geoip|file_system_buffer|composite|"
                      r"squash|transport_sockets\.tap|alts|starttls|ext_proc\.v3\.ProcessingRequest")


def crate():
    if len(sys.argv) > 1:
        return sys.argv[1]
    home = os.environ.get("CARGO_HOME", os.path.expanduser("~/.cargo"))
    found = sorted(glob.glob(os.path.join(home, "registry/src/*/envoy-types-*")))
    if not found:
        sys.exit("no envoy-types in the registry: build once, or give its path")
    return found[-1]


def tokens(text):
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.S)
    return re.findall(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\'|[A-Za-z_][\w.]*|\.[A-Za-z_][\w.]*|-?\d[\w.+-]*|[^\s]', text)


class File:
    def __init__(self, text):
        self.toks, self.at, self.package = tokens(text), 0, ""
        self.messages, self.enums = {}, {}
        while self.at < len(self.toks):
            word = self.next()
            if word == "package":
                self.package = self.next()
                self.until(";")
            elif word == "message":
                self.message([self.package] if self.package else [])
            elif word == "enum":
                self.enum([self.package] if self.package else [])
            elif word in ("service", "extend"):
                self.next()
                self.block()
            elif word != ";":
                self.until(";")

    def next(self):
        self.at += 1
        return self.toks[self.at - 1]

    def peek(self):
        return self.toks[self.at]

    def until(self, end):
        depth = 0
        while True:
            token = self.next()
            if token in "{[(":
                depth += 1
            elif token in "}])":
                depth -= 1
            elif token == end and depth == 0:
                return

    def block(self):
        assert self.next() == "{"
        depth = 1
        while depth:
            token = self.next()
            depth += (token == "{") - (token == "}")

    def enum(self, scope):
        name = ".".join(scope + [self.next()])
        assert self.next() == "{"
        values = []
        while self.peek() != "}":
            word = self.next()
            if word in ("option", "reserved"):
                self.until(";")
            elif word != ";":
                assert self.next() == "=", name
                values.append((word, int(self.next(), 0)))
                self.until(";")
        self.next()
        self.enums[name] = values

    def message(self, scope):
        scope = scope + [self.next()]
        fields = []
        assert self.next() == "{"
        self.body(scope, fields, None)
        self.messages[".".join(scope)] = fields

    def body(self, scope, fields, oneof):
        count = 0
        while self.peek() != "}":
            word = self.next()
            if word in ("option", "reserved", "extensions"):
                self.until(";")
            elif word == "message":
                self.message(scope)
            elif word == "enum":
                self.enum(scope)
            elif word == "extend":
                self.next()
                self.block()
            elif word == "oneof":
                self.next()
                assert self.next() == "{"
                self.body(scope, fields, count)
                count += 1
            elif word == "map" and self.peek() == "<":
                self.next()
                key = self.next()
                assert self.next() == ","
                value = self.next()
                assert self.next() == ">"
                self.field(scope, fields, value, oneof, "%" + SCALARS[key] + "=")
            elif word in ("repeated", "optional", "required"):
                self.field(scope, fields, self.next(), oneof, "*" if word == "repeated" else "")
            elif word != ";":
                self.field(scope, fields, word, oneof, "")
        self.next()

    def field(self, scope, fields, kind, oneof, prefix):
        name = self.next()
        assert self.next() == "=", (scope, kind, name)
        number = int(self.next(), 0)
        self.until(";")
        fields.append((name, number, prefix, kind, oneof, ".".join(scope)))


def main():
    root = os.path.join(crate(), "proto")
    messages, enums = {}, {}
    for path in glob.glob(root + "/**/*.proto", recursive=True):
        with open(path, encoding="utf-8") as file:
            parsed = File(file.read())
        messages.update(parsed.messages)
        enums.update(parsed.enums)
    for name, fields in FOREIGN.items():
        messages[name] = [(field, number, prefix, kind, None, name) for (field, number, prefix, kind) in fields]
    enums.update(FOREIGN_ENUMS)
    # google/protobuf itself is not in the crate: the reader knows those types by name.
    known = ["Any", "Duration", "Timestamp", "Struct", "Value", "ListValue", "Empty", "FieldMask", "BoolValue",
             "StringValue", "BytesValue", "DoubleValue", "FloatValue", "Int32Value", "Int64Value", "UInt32Value",
             "UInt64Value"]
    for name in known:
        messages.setdefault("google.protobuf." + name, [])
    for name in list(messages):
        if name.startswith("google.protobuf.") and name.split(".")[-1] in known:
            messages[name] = []

    def resolve(kind, scope):
        if kind.startswith("."):
            return kind[1:]
        parts = scope.split(".")
        for end in range(len(parts), -1, -1):
            name = ".".join(parts[:end] + [kind])
            if name in messages or name in enums:
                return name
        return None

    wanted, queue = set(), [name for name in ROOTS + list(FOREIGN) if name in messages]
    for name in messages:
        rest = name[len("envoy.extensions."):]
        if name.startswith("envoy.extensions.") and not LEFT_OUT.search(name):
            if any(rest.startswith(prefix + ".") for prefix in EXTENSIONS):
                queue.append(name)
    while queue:
        name = queue.pop()
        if name in wanted:
            continue
        wanted.add(name)
        for (_, _, _, kind, _, scope) in messages.get(name, []):
            if kind not in SCALARS:
                found = resolve(kind, scope)
                if found is None:
                    print(f"warning: {kind} of {name} is not known", file=sys.stderr)
                else:
                    queue.append(found)
    names = sorted(wanted)
    index = {name: line for line, name in enumerate(names)}
    lines = []
    for name in names:
        if name in enums:
            lines.append("e " + name + "".join(f" {value}:{number}" for value, number in enums[name]))
            continue
        line = "m " + name
        for (field, number, prefix, kind, oneof, scope) in messages[name]:
            if kind in SCALARS:
                code = SCALARS[kind]
            else:
                found = resolve(kind, scope)
                if found is None:
                    continue
                code = ("E" if found in enums else "M") + str(index[found])
            line += f" {field}:{number}:{prefix}{code}" + (f"|{oneof}" if oneof is not None else "")
        lines.append(line)
    out = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../mesh/proxy/src/bootstrap/schema.txt")
    with open(out, "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    print(f"{len(names)} types, {os.path.getsize(out)} bytes")


main()
