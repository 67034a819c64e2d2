package policy

// Audit is the label of a NetworkPolicy, or of a Namespace for all NetworkPolicies in it, by which they are audited. It is a label and no
// annotation so that what is not enforced can be listed (kubectl get networkpolicies,namespaces -A -l fathom.network/audit=true).
const Audit = "fathom.network/audit"

// AuditLabel says whether labels have it. Any other value is none: what is not certain is enforced.
func AuditLabel(labels map[string]string) bool { return labels[Audit] == "true" }
