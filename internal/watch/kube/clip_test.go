package kube_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/fathom-network/fathom/internal/watch/kube"
)

func TestClip(t *testing.T) {
	for _, message := range []string{"", "short", strings.Repeat("a", 1024)} {
		if got := kube.Clip(message); got != message {
			t.Errorf("%d bytes became %d", len(message), len(got))
		}
	}
	for _, long := range []string{strings.Repeat("a", 1025), strings.Repeat("é", 600), "a" + strings.Repeat("é", 600)} {
		if got := kube.Clip(long); len(got) > 1024 || len(got) < 1020 || !utf8.ValidString(got) || !strings.HasSuffix(got, " ...") {
			t.Errorf("%d bytes became %d, valid UTF-8: %v", len(long), len(got), utf8.ValidString(got))
		}
	}
}
