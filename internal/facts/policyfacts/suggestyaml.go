package policyfacts

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"

	"go.yaml.in/yaml/v3"

	"github.com/fathom-network/fathom/internal/facts/policy"
)

// YAML writes suggestions as a manifest, with what each rule is from in a comment.
func YAML(list []Suggestion) ([]byte, error) {
	var out bytes.Buffer
	for _, s := range list {
		encoded, err := json.Marshal(s.Policy)
		if err != nil {
			return nil, err
		}
		var doc yaml.Node // JSON is YAML
		if err := yaml.Unmarshal(encoded, &doc); err != nil {
			return nil, fmt.Errorf("write NetworkPolicy %s/%s: %w", s.Policy.Namespace, s.Policy.Name, err)
		}
		root := doc.Content[0]
		plain(root)
		remove(root, "status")
		remove(field(root, "metadata"), "creationTimestamp")
		root.HeadComment = "For " + s.About
		for d, name := range map[policy.Direction]string{policy.Ingress: "ingress", policy.Egress: "egress"} {
			if rules := field(field(root, "spec"), name); rules != nil {
				for i, r := range rules.Content {
					r.HeadComment = s.Rules[d][i]
				}
			}
		}
		out.WriteString("---\n")
		enc := yaml.NewEncoder(&out)
		enc.SetIndent(2)
		if err := enc.Encode(&doc); err != nil {
			return nil, fmt.Errorf("write NetworkPolicy %s/%s: %w", s.Policy.Namespace, s.Policy.Name, err)
		}
	}
	return out.Bytes(), nil
}

// word is text that no reader of YAML takes for anything else, unless it is one of ofYAML11. kubectl's is of YAML 1.1, in which y is true.
var (
	word     = regexp.MustCompile(`^[A-Za-z][-A-Za-z0-9./_]*$`)
	ofYAML11 = regexp.MustCompile(`(?i)^(y|n|yes|no|on|off|true|false|null)$`)
)

// plain takes away JSON's braces, and quotes where they say nothing.
func plain(n *yaml.Node) {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" || word.MatchString(n.Value) && !ofYAML11.MatchString(n.Value) {
		n.Style = 0
	}
	for _, c := range n.Content {
		plain(c)
	}
}

func field(n *yaml.Node, name string) *yaml.Node {
	for i := 0; n != nil && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i+1]
		}
	}
	return nil
}

func remove(n *yaml.Node, name string) {
	for i := 0; n != nil && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			n.Content = append(n.Content[:i], n.Content[i+2:]...)
			return
		}
	}
}
