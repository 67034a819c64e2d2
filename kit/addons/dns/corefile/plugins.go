package corefile

import (
	"slices"
	"strings"
)

// ruleOf says of a plugin that comes with CoreDNS (1.14's plugin.cfg) why what it answers depends on who asks; "" if it
// does not. They are in CoreDNS's order.
var ruleOf = map[string]func(words []string) string{
	"root":     never,
	"metadata": never, // who uses what it collects is looked at
	"geoip":    always("looks up where a client is"),
	"cancel":   never,
	"tls":      never, "quic": never, "grpc_server": never, "https": never, "https3": never,
	"timeouts": never, "multisocket": never, "reload": never, "nsid": never, "bufsize": never,
	"bind": never, "debug": never, "trace": never, "ready": never, "health": never, "pprof": never, "prometheus": never,
	"errors": never, "log": never, "dnstap": never, "local": never,
	"dns64":       ofDNS64,
	"any":         never,
	"chaos":       never,
	"loadbalance": never,
	"tsig":        always("asks clients for signatures, which a cache cannot make"),
	"cache":       never,
	"rewrite":     ofRewrite,
	"acl":         always("decides by the client's address"),
	"header":      never,
	"dnssec":      never,
	"autopath":    ofAutopath,
	"minimal":     never,
	"template":    ofTemplate,
	"transfer":    never, // of whole zones, which a cache refuses
	"hosts":       never,
	"route53":     never, "azure": never, "clouddns": never, "k8s_external": never, "kubernetes": never,
	"file": never, "auto": never, "secondary": never, "etcd": never, "loop": never, "forward": never, "grpc": never,
	"erratic": never,
	"whoami":  always("answers with the client's address"),
	"on":      never,
	"sign":    never,
	"view":    always("decides who is answered by this server"),
	"nomad":   never,
}

// dependsBy says why what a directive has answered depends on who asks, or "".
func dependsBy(directive []token) string {
	words := make([]string, len(directive))
	for i, t := range directive {
		words[i] = t.text
	}
	rule := ruleOf[words[0]]
	if rule == nil {
		return "does not come with CoreDNS, and may look at who asks"
	}
	return rule(words[1:])
}

func never([]string) string { return "" }

func always(why string) func([]string) string { return func([]string) string { return why } }

// ofDNS64 is for a plugin that makes addresses of its own for clients that ask by IPv6, if it is not told to do so for all.
func ofDNS64(words []string) string {
	if slices.Contains(words, "allow_ipv4") {
		return ""
	}
	return "answers by the family of the client's address (allow_ipv4 is not there)"
}

// ofRewrite is for what a query that is passed on tells of the client.
func ofRewrite(words []string) string {
	at := slices.Index(words, "edns0")
	if at < 0 {
		return ""
	}
	for _, w := range words[at:] {
		variable := len(w) > 1 && strings.HasPrefix(w, "{") && w != "{qname}" && w != "{qtype}"
		if w == "subnet" || variable {
			return "tells those that it asks about the client (edns0 " + w + ")"
		}
	}
	return ""
}

// ofAutopath is for search lists: those of the client's pod, if another plugin is to say them.
func ofAutopath(words []string) string {
	if slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, "@") }) {
		return "answers by the namespace of the client's pod"
	}
	return ""
}

// ofTemplate is for what an answer may be made of besides the question.
func ofTemplate(words []string) string {
	for _, w := range words {
		for _, of := range []string{".Remote", ".Meta"} {
			if strings.Contains(w, of) {
				return "makes answers of what is known of the client (" + of + ")"
			}
		}
	}
	return ""
}
