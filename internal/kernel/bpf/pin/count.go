package pin

// Verdicts.
const (
	Redirected = "redirected"
	Passed     = "stack"
	Dropped    = "dropped"
)

// Reasons are all reasons, in the order of `enum reason` in c/fastpath.c, with the verdict of each.
var Reasons = []struct{ Verdict, Name string }{
	{"", ""},
	{Redirected, "to_pod"},
	{Redirected, "to_node"},
	{Redirected, "from_node"},
	{Passed, "elsewhere"},
	{Passed, "protocol"},
	{Passed, "fragment"},
	{Passed, "options"},
	{Passed, "ttl"},
	{Passed, "mtu"},
	{Passed, "tracked"},
	{Passed, "pod"},
	{Passed, "self"},
	{Passed, "not_ours"},
	{Dropped, "mac"},
	{Dropped, "source"},
	{Dropped, "arp"},
	{Dropped, "ethertype"},
}
